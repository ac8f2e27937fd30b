"""`SpawnedResult`: the result of a fit in spawned or forked processes, in the process that called ``trainer.fit``."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._decisions import LayerDecision
from lightning_estdgm.method._schedules import Schedule


@dataclass(frozen=True)
class SpawnedResult:
    """Result of a fit that ran in other processes, with some of `DGMController`'s properties and methods."""

    phase: str
    density: float
    flops_ratio: float
    schedule: Schedule
    _state: dict[str, Any]
    _decisions: tuple[LayerDecision, ...]
    _masks: dict[str, Tensor]

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return the decision for every linear and convolution layer."""
        return self._decisions

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's mask over units."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state."""
        return self._state


class SpawnedResultFile:
    """Temporary file that brings the result of a fit back to the process that called ``trainer.fit``.

    Lightning brings back the weights in the same way, but nothing of a callback.
    """

    def __init__(self) -> None:
        self._made_in = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"lightning_estdgm-{uuid.uuid4().hex}.pt"
        self._result: SpawnedResult | None = None
        weakref.finalize(self, _remove_by_maker, self._path, self._made_in)

    def leave(self, controller: DGMController, trainer: pl.Trainer) -> None:
        """Write the result of a fit; call it on every rank. Does nothing in the process that made this object."""
        if os.getpid() == self._made_in or not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            return
        content = {
            "state": controller.state_dict(),
            "decisions": [asdict(decision) for decision in controller.decisions()],
            "masks": controller.masks(),
            **{name: getattr(controller, name) for name in ("phase", "density", "flops_ratio")},
        }
        if trainer.is_global_zero:
            torch.save(content, self._path)

    def result(self, config: DGMConfig) -> SpawnedResult | None:
        """Return the result of the last fit in other processes, or None."""
        if os.getpid() == self._made_in and self._path.exists():
            content = torch.load(self._path, weights_only=True)
            self._path.unlink()
            self._result = SpawnedResult(
                phase=content["phase"],
                density=content["density"],
                flops_ratio=content["flops_ratio"],
                schedule=config.schedule.resolve(content["state"]["total_steps"]),
                _state=content["state"],
                _decisions=tuple(LayerDecision(**decision) for decision in content["decisions"]),
                _masks=content["masks"],
            )
        return self._result


def _remove_by_maker(path: Path, made_in: int) -> None:
    if os.getpid() == made_in:
        path.unlink(missing_ok=True)
