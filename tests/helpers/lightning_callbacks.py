"""Lightning's own callbacks, loggers and plugins that are run beside `DGMCallback` and `EnergyMonitor`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as ours
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO

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

    """

    callbacks: Callable[[Path], list[pl.Callback]] = lambda folder: []
    trainer: Callable[[Path], dict[str, Any]] = lambda folder: {}
    not_checked: dict[str, str] = field(default_factory=dict)


def _throughput() -> pl.Callback:
    return ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)


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
        lambda folder: [ours.ModelCheckpoint(folder / "top", monitor="train_loss", save_top_k=2, save_last=True)]
    ),
    "ModelCheckpoint, every 5 steps": Row(
        lambda folder: [ours.ModelCheckpoint(folder / "every", every_n_train_steps=5, save_top_k=-1)]
    ),
    "OnExceptionCheckpoint": Row(lambda folder: [ours.OnExceptionCheckpoint(folder / "exception")]),
    "LearningRateMonitor": Row(
        lambda _: [ours.LearningRateMonitor("step")], lambda folder: {"logger": CSVLogger(folder, version="rates")}
    ),
    "DeviceStatsMonitor": Row(
        lambda _: [ours.DeviceStatsMonitor()], lambda folder: {"logger": CSVLogger(folder, version="stats")}
    ),
    "ModelSummary": Row(lambda _: [ours.ModelSummary(2)]),
    "RichModelSummary": Row(lambda _: [ours.RichModelSummary()]),
    "RichProgressBar": Row(lambda _: [ours.RichProgressBar()], lambda _: {"enable_progress_bar": True}),
    "TQDMProgressBar": Row(lambda _: [ours.TQDMProgressBar()], lambda _: {"enable_progress_bar": True}),
    "ThroughputMonitor": Row(lambda _: [_throughput()], lambda folder: {"logger": CSVLogger(folder, version="fast")}),
    "CSVLogger": Row(trainer=lambda folder: {"logger": CSVLogger(folder, version="curves")}),
    "TensorBoardLogger": Row(trainer=lambda folder: {"logger": TensorBoardLogger(folder, version="curves")}),
    "AsyncCheckpointIO": Row(trainer=lambda _: {"plugins": [AsyncCheckpointIO()]}),
    "SparseCheckpointIO": Row(trainer=lambda _: {"plugins": [SparseCheckpointIO()]}),
    "gradient clipping and anomaly detection": Row(
        trainer=lambda _: {"gradient_clip_val": 0.5, "detect_anomaly": True}
    ),
}


def rows() -> list[tuple[str, dict[str, str]]]:
    """Return each row's name and, by invariant, ``"yes"`` or the reason why it does not hold."""
    return [(name, {what: row.not_checked.get(what, "yes") for what in CHECKED}) for name, row in ROWS.items()]


def is_installed(name: str) -> bool:
    """Return whether the library that a row needs is there."""
    return name != "TensorBoardLogger" or importlib.util.find_spec("tensorboard") is not None
