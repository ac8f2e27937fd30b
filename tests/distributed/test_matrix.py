"""Every cell of `distributed_matrix.py`: equal masks on all ranks, exact budgets, expected weights, or a refusal."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    XLAStrategy,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from helpers import distributed_jobs as jobs
from helpers import distributed_matrix as matrix
from helpers.models import SCHEDULE, Batches, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, Units
from lightning_estdgm.distributed.adapters._protocol import adapter_for
from lightning_estdgm.modules._candidates import clean_name

STEPS, GLOBAL_BATCH = 20, 16
ADAMW = {"lr": 1e-3, "eps": 1e-4}  # eps: within the range of float16


class Net(pl.LightningModule):
    """Two linear layers, masked by blocks and computed by the sparse operator, and a convolution, by single weights."""

    def __init__(self, zero: bool, shard: bool) -> None:
        super().__init__()
        self.zero, self.shard = zero, shard
        self.first = nn.Linear(128, 128)
        self.convolution = nn.Conv1d(8, 16, 3, padding=1)
        self.last = nn.Linear(256, 128)
        self.head = nn.Linear(128, 1)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.shard:
            mesh = self.device_mesh["data_parallel"]
            if self.device_mesh["tensor_parallel"].size() > 1:
                plan = {
                    "first": ColwiseParallel(output_layouts=Replicate()),
                    "last": RowwiseParallel(input_layouts=Replicate()),
                }
                parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
            for layer in self.children():
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.convolution(F.gelu(self.first(x)).unflatten(1, (8, 16)))
        loss = F.mse_loss(self.head(F.gelu(self.last(hidden.flatten(1)))).squeeze(1), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        if self.zero:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where imported: not in pytest's process

            return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.AdamW, **ADAMW)
        return torch.optim.AdamW(self.parameters(), **ADAMW)


def batches(accumulate: int, ranks: int) -> Batches:
    """This rank's share of each global batch, which at most two share; with four, neighbours are tensor-parallel."""
    generator = torch.Generator().manual_seed(1)
    shares = min(2, ranks)
    share = torch.distributed.get_rank() * shares // ranks if ranks > 1 else 0
    x = torch.randn(STEPS * accumulate, shares, GLOBAL_BATCH // shares, 128, generator=generator)[:, share]
    return Batches((one, one[:, 0] * one[:, 1]) for one in x)


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the CPU for FSDPStrategy itself only; FSDP must be told the device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, mixed_precision=self.mixed_precision_config, device_id=torch.device("cpu"), **self.kwargs
        )


def make_strategy(name: str) -> Any:
    if name == "one device":
        return "auto"
    if name == "FSDP":
        return FSDPOnCPU(use_orig_params=True, auto_wrap_policy={nn.Linear, nn.Conv1d})
    if name.startswith("FSDP2"):
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2 if "tensor" in name else 1)
    if name == "DDP, unused parameters":
        return "ddp_find_unused_parameters_true"
    settings: dict[str, Any] = {}
    if "static graph" in name:
        settings["static_graph"] = True
    if "bucket views" in name:
        settings["gradient_as_bucket_view"] = True
    if "bf16" in name:
        settings["ddp_comm_hook"] = default_hooks.bf16_compress_hook
    if "PowerSGD" in name:
        settings |= {"ddp_comm_hook": powerSGD_hook.powerSGD_hook, "ddp_comm_state": powerSGD_hook.PowerSGDState(None)}
    if "local SGD" in name:
        state = post_localSGD_hook.PostLocalSGDState(None, None, start_localSGD_iter=10)
        settings |= {
            "ddp_comm_hook": post_localSGD_hook.post_localSGD_hook,
            "ddp_comm_state": state,
            "model_averaging_period": 4,
        }
    return DDPStrategy(**settings)


def precision_settings(precision: str, name: str) -> dict[str, Any]:
    if precision == "16-mixed" and "FSDP" not in name:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    return {"precision": precision}


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def weights_of(trainer: pl.Trainer, module: Net) -> dict[str, Tensor]:
    if isinstance(trainer.strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
            return {clean_name(name): p.detach().clone() for name, p in module.named_parameters()}
    return {name: whole(p) for name, p in module.named_parameters()}


class Look(pl.Callback):
    """Whole weights at the end of the fit, while the strategy still has them spread."""

    weights: dict[str, Tensor]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = weights_of(trainer, pl_module)


def run_cell(name: str, precision: str, accumulate: int) -> dict[str, Any]:
    """Fit, and return plain facts, or the error."""
    pl.seed_everything(0, verbose=False)
    ranks = matrix.ROWS[name].ranks
    config = (
        DGMConfig(SCHEDULE, Units(size=1), backend="auto") if "tensor" in name else DGMConfig(SCHEDULE, backend="cpu")
    )
    look = Look()
    try:
        callback = DGMCallback(config, compress_gradients="active units only" in name)
        trainer = make_trainer(
            callback,
            look,
            devices=ranks,
            strategy=make_strategy(name),
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            **precision_settings(precision, name),
        )
        module = Net(zero="ZeRO" in name, shard=name.startswith("FSDP2"))
        trainer.fit(module, batches(accumulate, ranks))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "error": None,
        "masks": callback.masks(),
        "blocks": {d.name: d.block_size for d in callback.decisions()},
        "backends": {d.name: d.backend for d in callback.decisions()},
        "weights": look.weights,
        "density": callback.density,
        "final": callback.schedule(STEPS - 1).density,
        "steps": callback.controller.steps,
        "loss": module.losses[-1],
    }


def run_cells(ranks: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    """In each rank: every cell for that many ranks that needs no class of its own."""
    runnable = [c for c in matrix.cells() if matrix.ROWS[c[0]].ranks == ranks and c[0] not in UNINSTALLED]
    return {cell: run_cell(*cell) for cell in runnable}


Records = dict[tuple[str, str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def records() -> Records:
    found: Records = {}
    for ranks in (1, 2, 4):
        by_rank = jobs.run(run_cells, ranks, ranks)
        found |= {cell: [record[cell] for record in by_rank] for cell in by_rank[0]}
    return found


UNINSTALLED: dict[str, type[Strategy]] = {"DeepSpeed": DeepSpeedStrategy, "XLA": XLAStrategy}
"""Strategies of libraries that are not installed: they cannot be made, but they can be asked about."""


def expanded(mask: Tensor, block_size: int) -> Tensor:
    return mask if block_size == 1 else mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)


@pytest.mark.parametrize(("name", "precision", "accumulate"), list(matrix.cells()))
def test_cell(records: Records, name: str, precision: str, accumulate: int) -> None:
    row = matrix.ROWS[name]
    refusal = row.refusal(precision, accumulate)
    if name in UNINSTALLED:
        cls = UNINSTALLED[name]
        with pytest.raises(ValueError, match=refusal):
            adapter_for(cls.__new__(cls))
        return
    ranks = records[name, precision, accumulate]
    assert len(ranks) == row.ranks
    if refusal is not None:
        assert all(record["error"] and re.search(refusal, record["error"]) for record in ranks), ranks
        return
    for record in ranks:
        jobs.skip_where_fsdp2_fails(record["error"] or "")
        assert record["error"] is None
        assert math.isfinite(record["loss"])
        assert record["steps"] == STEPS
        assert set(record["masks"]) == {"first", "convolution", "last"}
        block_size = 1 if "tensor" in name else 16
        assert record["blocks"] == {"first": block_size, "convolution": 1, "last": block_size, "head": 0}
        active = total = 0
        for layer, mask in record["masks"].items():
            assert torch.equal(mask, ranks[0]["masks"][layer])
            keep, weight = expanded(mask, record["blocks"][layer]), record["weights"][f"{layer}.weight"]
            assert torch.count_nonzero(weight[~keep]) == 0
            assert torch.count_nonzero(weight[keep]) > 0.5 * keep.sum()
            active, total = active + int(keep.sum()), total + keep.numel()
        assert record["density"] == active / total
        assert abs(active - record["final"] * total) < 16 * 16
        for parameter, weight in record["weights"].items():
            assert torch.equal(weight, ranks[0]["weights"][parameter])
            assert weight.isfinite().all()
    if row.like:
        assert_same_run(ranks[0], records[row.like, precision, accumulate][0])
    alone = name.startswith("DDP") and not row.like and "bf16" not in name and "ZeRO" not in name  # as the preface says
    if alone and precision == "64-true":
        # Rounding aside, two ranks with half a batch each are one device with the whole batch.
        expected = records["one device", precision, accumulate][0]
        for parameter, weight in ranks[0]["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][parameter], rtol=1e-7, atol=1e-9)
    if name in ("FSDP", "FSDP2") and precision == "32-true":
        expected = records["DDP", precision, accumulate][0]
        for parameter, weight in ranks[0]["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][parameter], rtol=1e-4, atol=1e-6)


def assert_same_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for parameter, weight in theirs["weights"].items():
        assert torch.equal(ours["weights"][parameter], weight), parameter
    for layer, mask in theirs["masks"].items():
        assert torch.equal(ours["masks"][layer], mask), layer


def test_control_another_seed_is_another_run(records: Records) -> None:
    """What "like DDP" compares would show a difference."""
    with pytest.raises(AssertionError):
        assert_same_run(records["DDP", "32-true", 1][0], records["DDP", "32-true", 2][0])


def test_sparse_operators_ran_under_ddp(records: Records) -> None:
    for record in records["DDP", "32-true", 1]:
        assert record["backends"] == {"first": "cpu", "convolution": "dense", "last": "cpu", "head": "dense"}


def test_unknown_strategy_is_refused_by_the_fit() -> None:
    class XLAStrategy(SingleDeviceStrategy):
        """Only its name counts."""

    trainer = make_trainer(DGMCallback(), strategy=XLAStrategy(device="cpu"), max_steps=2)
    with pytest.raises(ValueError, match=r"expected a strategy out of .*DDPStrategy.* got XLAStrategy"):
        trainer.fit(Net(False, False), batches(1, 1))


def test_document_shows_the_table_as_it_is() -> None:
    path = Path(__file__).parents[2] / "docs" / "guides" / "strategies.md"
    assert path.read_text(encoding="utf-8") == matrix.markdown(), (
        "python -m tests.distributed.matrix > docs/guides/strategies.md"
    )
