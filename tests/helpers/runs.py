"""What tests of checkpoints share: one schedule, how a run is made, what must be equal at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.models import GAN, ResumableLoader, TinyMLP, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase

# 40 steps in five epochs: masks change before steps 4, 8, ..., 32, the three steps before each are observed.
SCHEDULE = EstDgm(
    exploration=Phase(0.7, 0.6, 12),
    consolidation=Phase(0.3, 0.2, 12),
    refinement=Phase(0.15, 0.1, 16),
    update_every=4,
    observe_steps=3,
    freeze=0.5,
)
STEPS, EPOCH_STEPS = 40, 8


class Run:
    """How the module, the callback and the Trainer of one sort of run are made."""

    def __init__(self, cls: type[Any], *, accumulate: int = 1, config: dict[str, Any] | None = None, **trainer: Any):
        self.cls, self.accumulate, self.config, self.trainer = cls, accumulate, config or {}, trainer

    def module(self) -> Any:
        return self.cls() if self.cls is GAN else self.cls(scheduler="onecycle")

    def callback(self) -> DGMCallback:
        return DGMCallback(DGMConfig(schedule=SCHEDULE).merged(**self.config))

    def loader(self) -> ResumableLoader:
        batches = (TinyMLP if self.cls is GAN else self.cls).batches(EPOCH_STEPS * self.accumulate)
        return ResumableLoader(batches)

    def fit(
        self, *extra: pl.Callback, ckpt: Path | None = None, seed: int = 0, before: tuple[pl.Callback, ...] = ()
    ) -> tuple[Any, DGMCallback, pl.Trainer]:
        pl.seed_everything(seed, verbose=False)
        module, callback = self.module(), self.callback()
        limits = {"max_steps": STEPS * (2 if self.cls is GAN else 1), "max_epochs": -1}
        trainer = make_trainer(
            *before,
            callback,
            *extra,
            accumulate_grad_batches=self.accumulate,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in extra),
            **limits | self.trainer,
        )
        trainer.fit(module, self.loader(), ckpt_path=ckpt)
        return module, callback, trainer


def end_of(module: Any, callback: DGMCallback, trainer: pl.Trainer) -> dict[str, Any]:
    """Everything about the end of a run that must be the same."""
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "dgm": callback.state_dict(),
        "masks": callback.masks(),
        "decisions": [(d.name, d.density, d.backend, d.final_backend) for d in callback.decisions()],
        "numbers": (callback.phase, callback.density, callback.flops_ratio, callback.controller.explored),
        "global_step": trainer.global_step,
    }


_TIMES = {"dense_s", "sparse_s", "why"}
"""Entries of a state that hold measured times, which no two runs share."""


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, but for measured times; tensors compared to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in a if k in b and k not in _TIMES]
        return [f"{path}.{k}" for k in a.keys() ^ b.keys()] + [
            d for k in keys for d in differences(a[k], b[k], f"{path}.{k}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    if callable(a) and callable(b):
        return []
    return [] if a == b else [path]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


class SaveAt(pl.Callback):
    """Saves by `trainer.save_checkpoint` in a hook of the user's choice, after one step."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self._save)

    def _save(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
