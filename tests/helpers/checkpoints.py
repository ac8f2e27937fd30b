"""Runs that save checkpoints, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.models import GAN, MLP, ResumableLoader, callback_for, make_trainer
from lightning_estdgm import DGMCallback

STEPS = 20  # of models.SCHEDULE: final density 0.10, the last update before step 15
INSIDE_A_WINDOW = 14


def loader(model: type[Any]) -> ResumableLoader:
    return ResumableLoader((MLP if model is GAN else model).batches(STEPS))


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class GANOfMLP(GAN):
    """For batches 128 wide."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch[0][:, :16], batch[1]), batch_idx)


def fit(
    *callbacks: pl.Callback, model: type[Any] = MLP, ckpt: Path | None = None, dgm: Any = None, **settings: Any
) -> tuple[Any, DGMCallback, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module = GANOfMLP() if model is GAN else model()
    callback = callback_for(**dgm or {})
    limits = {"max_steps": STEPS * (2 if model is GAN else 1), "max_epochs": -1}
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = make_trainer(callback, *callbacks, enable_checkpointing=checkpointing, **limits | settings)
    trainer.fit(module, loader(model), ckpt_path=ckpt)
    return module, callback, trainer


def end_of(module: Any, callback: DGMCallback, trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "dgm": callback.state_dict(),
    }


def ordinary(path: Path) -> Any:
    return torch.load(path, weights_only=True)


class Alien:
    """A class that a checkpoint holds only if somebody put it there."""

    loaded = 0

    def __init__(self) -> None:
        self.x = 1

    def __setstate__(self, state: Any) -> None:
        Alien.loaded += 1
        self.__dict__.update(state)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("no state for you")
