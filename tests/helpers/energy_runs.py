"""A small model and Trainer for runs under `EnergyMonitor`, with a source of constant power."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.energy_parts import ConstantPower
from lightning_estdgm.callbacks.energy import EnergyMonitor

WATTS = 100.0


class Net(LightningModule):
    def __init__(self, skip: tuple[int, ...] = (), fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.skip, self.fail_at = skip, fail_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == self.fail_at:
            raise RuntimeError("out of luck")
        time.sleep(0.002)
        return None if batch_idx in self.skip else self.layer(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(0.005)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Phases(Callback):
    """Stands where DGMCallback stands: moves on at the end of a batch."""

    def __init__(self) -> None:
        self.phase = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = "exploration"

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.phase = "exploration" if trainer.global_step < 4 else "refinement"


def data(n: int = 32, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 4)), batch_size=batch_size)


def trainer(tmp_path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | kwargs))


def monitor(*sources: ConstantPower, **kwargs: Any) -> EnergyMonitor:
    return EnergyMonitor(list(sources) or [ConstantPower(watts=WATTS)], **kwargs)


def no_thread() -> bool:
    return not [t for t in threading.enumerate() if t.name == "estdgm-energy"]


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
