"""One run of the demo by a real Trainer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.tools._quiet import environment_variable
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._recorder import Recorder
from lightning_estdgm.tools.demo._records import DGM, RunRecord
from lightning_estdgm.tools.demo._served import seconds_a_token
from lightning_estdgm.tools.demo._session import ProgressBar, new_trainer


def train(config: DemoConfig, mode: str, seed: int, lr: float, bar: ProgressBar | None, logs: Path) -> RunRecord:
    """Train one run. Initial weights and batches depend on ``seed`` alone, not on ``mode``.

    Args:
        config: Model, data and training.
        mode: `DENSE`, `DGM` or `SMALL`; for the last, ``config`` is the smaller network's.
        seed: Seed of initial weights, batches and masks.
        lr: Peak learning rate.
        bar: Progress bar to move; None for none.
        logs: Folder for the TensorBoard run.
    """
    data = config.data(seed)
    data.setup()
    torch.manual_seed(seed)
    model = config.model(lr)
    initial = _digest(p.detach() for p in model.parameters())
    dgm = DGMCallback(replace(config.dgm, seed=seed)) if mode == DGM else None
    monitor = EnergyMonitor(interval_s=0.25)  # a curve needs points closer together than a total does
    recorder = Recorder(monitor, dgm)
    if bar:
        bar.begin(f"{mode} seed {seed} lr {lr:g}", recorder)
    logger = TensorBoardLogger(logs, name="", version=run_name(mode, seed, lr), default_hp_metric=False)
    # The recorder comes after the callbacks that it measures, the bar after the recorder that it reads.
    callbacks = [c for c in (dgm, monitor, recorder, bar) if c is not None]
    trainer = new_trainer(
        callbacks,
        max_steps=config.steps,
        logger=logger,
        log_every_n_steps=max(1, min(10, config.steps // 50)),
        val_check_interval=config.val_interval(),
        check_val_every_n_epoch=None,
    )
    called = time.perf_counter()
    with environment_variable("PL_GLOBAL_SEED", str(seed)):  # where EnergyMonitor looks for the seed
        trainer.fit(model, datamodule=data)
    logger.finalize("success")
    masked, active, outside = count_masked(model, dgm) if dgm else (0, 0, 0)
    return RunRecord(
        mode=mode,
        seed=seed,
        lr=lr,
        width=config.width,
        parameters=sum(p.numel() for p in model.parameters()),
        setup_s=recorder.origin - called,
        steps=recorder.steps,
        validation=recorder.validation,
        initial=initial,
        batches=recorder.batches.hexdigest(),
        energy=recorder.energy,
        layers=[{**asdict(d), "shape": list(d.shape)} for d in dgm.decisions()] if dgm else [],
        masks=recorder.moments,
        masked_weights=masked,
        active_weights=active,
        nonzero_outside=outside,
        flops_ratio=dgm.flops_ratio if dgm else 1.0,
        token_s=seconds_a_token(model, is_sparse=dgm is not None),
    )


def run_name(mode: str, seed: int, lr: float) -> str:
    """Name of a run's folder."""
    return f"{mode}-seed{seed}-lr{lr:g}"


def count_masked(model: LightningModule, dgm: DGMCallback) -> tuple[int, int, int]:
    """Number of weights in masked layers, of those inside the masks, and of those outside that are not zero."""
    total = active = outside = 0
    masks = dgm.masks()
    for layer in dgm.decisions():
        if not layer.masked:
            continue
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        inside = expand_mask(masks[layer.name].to(weight.device), layer.block_size)
        total += weight.numel()
        active += int(inside.sum())
        outside += int((weight[~inside] != 0).sum())
    return total, active, outside


def _digest(tensors: Iterator[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
