"""Lightning's own callbacks and plugins that are run beside `DGMCallback` and `EnergyMonitor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as ours
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn

from helpers.compatibility import Outcome
from helpers.models import Task, TinyMLP
from lightning_estdgm import SparseCheckpointIO

CHECKED = (
    "weights are zero outside the masks after every step",
    "the masks have exactly the units of the schedule's budget",
    "state-dict keys are those of the model without the callback",
    "a resumed run ends with the weights, masks and optimizer states of the straight one, to the bit",
    "energy.json lies in the run's folder",
)
"""What holds in every row, but for what its `not_checked` names."""


@dataclass(frozen=True)
class Row:
    """What one run has beside our callbacks.

    Attributes:
        callbacks: makes the callbacks, given a folder.
        trainer: makes more arguments of the Trainer, given a folder.
        not_checked: invariants of `CHECKED` that do not hold, with the reason.
        module: makes the module.
        leaves: globs over files that the run has to leave in its folder.
        logs: names that have to be in ``metrics.csv``.
        library: module of another library that the callbacks are of; where it is missing, the row's test is skipped.
        fails_at: step after which a run breaks off; the file that `leaves` names has to be the checkpoint of that step.

    """

    callbacks: Callable[[Path], list[pl.Callback]] = lambda folder: []
    trainer: Callable[[Path], dict[str, Any]] = lambda folder: {}
    not_checked: dict[str, str] = field(default_factory=dict)
    module: Callable[[], Any] = TinyMLP
    leaves: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    library: str = ""
    fails_at: int | None = None


class Transfer(Task):
    """A backbone and a head of two layers; its optimizer holds what is not frozen, as `BackboneFinetuning` asks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())
        self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.head(self.backbone(x)).squeeze(-1) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


_BROKEN_OFF = "the file is that of step 21 to the bit, but its loader has passed the batch that failed by"


def _thaws(epoch: int) -> Callable[[Path], list[pl.Callback]]:
    return lambda _: [ours.BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, backbone_initial_ratio_lr=0.5)]


def _scheduled(folder: Path) -> list[pl.Callback]:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    phases = {
        0: {"params": ["head.*"], "max_transition_epoch": 1},
        1: {"params": ["backbone.2.*"], "max_transition_epoch": 2, "lr": 1e-3},
        2: {"params": ["backbone.0.*"], "max_transition_epoch": 5, "lr": 1e-3},
    }
    return [
        FinetuningScheduler(ft_schedule=phases, epoch_transitions_only=True, restore_best=False),
        FTSCheckpoint(folder / "phases", monitor="train_loss", save_top_k=1, save_last=True),
    ]


def _throughput() -> pl.Callback:
    return ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)


_SHORT = {CHECKED[3]: "resumed run not checked"}
REFUSED = {"ModelPruning": "it replaces the parameters that are masked here: neither mask would hold"}
"""Callbacks that are refused beside `DGMCallback`, and why."""

ROWS: dict[str, Row] = {
    "nothing else": Row(),
    "WeightAveraging": Row(lambda _: [ours.WeightAveraging()]),
    "EMAWeightAveraging": Row(lambda _: [ours.EMAWeightAveraging(decay=0.9)]),
    "StochasticWeightAveraging": Row(
        lambda _: [ours.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=0.5)],
        not_checked={CHECKED[3]: "in mid-epoch lightning does not restore the average exactly, with or without masks"},
    ),
    "LambdaCallback": Row(lambda _: [ours.LambdaCallback(on_train_start=lambda *args: None)]),
    "GradientAccumulationScheduler": Row(lambda _: [ours.GradientAccumulationScheduler({0: 1, 3: 2})]),
    "Timer": Row(lambda _: [ours.Timer(duration={"hours": 1})]),
    "EarlyStopping": Row(lambda _: [ours.EarlyStopping("train_loss", patience=100)]),
    "ModelCheckpoint, best and last": Row(
        lambda folder: [ours.ModelCheckpoint(folder / "top", monitor="train_loss", save_top_k=2, save_last=True)],
        leaves=("top/last.ckpt", "top/epoch=*.ckpt"),
    ),
    "ModelCheckpoint, every 5 steps": Row(
        lambda folder: [ours.ModelCheckpoint(folder / "every", every_n_train_steps=5, save_top_k=-1)],
        leaves=("every/*step=40.ckpt",),
    ),
    "ModelCheckpoint, on an exception": Row(
        lambda folder: [ours.ModelCheckpoint(folder / "failed", every_n_epochs=9, save_on_exception=True)],
        not_checked={CHECKED[3]: _BROKEN_OFF},
        leaves=("failed/*step=21.ckpt",),
        fails_at=21,
    ),
    "OnExceptionCheckpoint": Row(
        lambda folder: [ours.OnExceptionCheckpoint(folder / "exception")],
        not_checked={CHECKED[3]: _BROKEN_OFF},
        leaves=("exception/*.ckpt",),
        fails_at=21,
    ),
    "SpikeDetection": Row(
        lambda folder: [ours.SpikeDetection(atol=1e6)],
        not_checked={CHECKED[3]: "lightning's own `load_state_dict` of it fails, with or without masks"},
    ),
    "BackboneFinetuning, thawed after 8 steps": Row(
        _thaws(1),
        module=Transfer,
        not_checked={CHECKED[3]: "once thawed, lightning's own resumed run differs, with or without masks"},
    ),
    "BackboneFinetuning, thawed after 24 steps": Row(_thaws(3), module=Transfer),
    "finetuning-scheduler, a layer an epoch": Row(
        _scheduled,
        module=Transfer,
        not_checked={CHECKED[3]: "its own resumed run differs, with or without masks"},
        library="finetuning_scheduler",
    ),
    "LearningRateMonitor": Row(
        lambda _: [ours.LearningRateMonitor("step")],
        lambda folder: {"logger": CSVLogger(folder, version="rates")},
        logs=("lr-AdamW/pg1", "lr-AdamW/pg2"),
    ),
    "DeviceStatsMonitor": Row(
        lambda _: [ours.DeviceStatsMonitor()], lambda folder: {"logger": CSVLogger(folder, version="stats")}
    ),
    "ModelSummary": Row(lambda _: [ours.ModelSummary(2)]),
    "RichModelSummary": Row(lambda _: [ours.RichModelSummary()]),
    "RichProgressBar": Row(lambda _: [ours.RichProgressBar()], lambda _: {"enable_progress_bar": True}),
    "TQDMProgressBar": Row(lambda _: [ours.TQDMProgressBar()], lambda _: {"enable_progress_bar": True}),
    "ThroughputMonitor": Row(lambda _: [_throughput()], lambda folder: {"logger": CSVLogger(folder, version="fast")}),
    "AsyncCheckpointIO": Row(trainer=lambda _: {"plugins": [AsyncCheckpointIO()]}),
    "SparseCheckpointIO": Row(trainer=lambda _: {"plugins": [SparseCheckpointIO()]}),
    "gradient clipping and anomaly detection": Row(
        trainer=lambda _: {"gradient_clip_val": 0.5, "detect_anomaly": True}
    ),
}


def cells(row: Row, outcome: Outcome) -> tuple[str, ...]:
    """Return the cells of a row: what was masked, what was checked, and what not."""
    reasons = Counter(outcome.dense.values())
    notes = [f"{reason} ({count} layer{'s' if count > 1 else ''})" for reason, count in reasons.items()]
    notes += [f"{_SHORT[what]}: {why}" for what, why in row.not_checked.items()]
    checked = "all" if not row.not_checked else f"{len(CHECKED) - len(row.not_checked)} of {len(CHECKED)}"
    return f"{outcome.share:.1%}", checked, "; ".join(notes)
