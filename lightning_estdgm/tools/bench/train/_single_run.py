"""One run of a workload, dense or sparse."""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_estdgm._environment import dynamo_settings
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.bench.train._train_config import TrainConfig
from lightning_estdgm.tools.bench.train._workloads import Workload, compile_blocks


def fit(workload: Workload, config: TrainConfig, steps: int, callbacks: Sequence[Callback], **settings: Any) -> int:
    """Train fresh weights for so many steps on one batch that lies on the device already.

    Returns:
        The most bytes that torch had allocated on the GPU; 0 on a CPU.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        torch.random.fork_rng(devices=[]),
        quiet_lightning(),
        contextlib.redirect_stdout(io.StringIO()),
        _dynamo(config),
    ):
        torch.manual_seed(0)
        with device:
            module = workload.module()
        if config.compiled:
            compile_blocks(module)
        loader = DataLoader(_Same(workload.batch(device)), batch_size=None)
        trainer = Trainer(
            **QUIET_TRAINER | {"accelerator": "cpu" if device.type == "cpu" else "gpu"},
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            max_steps=steps,
            callbacks=list(callbacks),
            gradient_clip_val=workload.clip,
            logger=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(module, loader, loader)  # the second is not used, but Lightning wants one
    del trainer, module, loader
    gc.collect()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        return peak
    return 0


def dgm_config(workload: Workload, config: TrainConfig, schedule: EstDgm) -> DGMConfig:
    """Return the callback's settings: defaults but for the schedule, and what was asked for."""
    exclude = () if config.block_size in ("auto", 1) else workload.without_blocks
    return DGMConfig(
        schedule=schedule,
        units=Units(size=config.block_size),  # type: ignore[arg-type]
        backend=config.backend,
        selection=Selection(exclude=exclude),
    )


@contextlib.contextmanager
def _dynamo(config: TrainConfig) -> Iterator[None]:
    """Make room for one version of a block for each density, and an error rather than a silent return to eager."""
    if not config.compiled:
        yield
        return
    import torch._dynamo

    dynamo = torch._dynamo.config
    limits = dynamo_settings(dynamo, recompile_limit=64, fail_on_recompile_limit_hit=True)
    with warnings.catch_warnings(), dynamo.patch(limits):
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")  # torch's own look at it
        yield


class _Same(IterableDataset[Any]):
    """One batch, again and again: loading it takes no time, dense or sparse."""

    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield self.batch
