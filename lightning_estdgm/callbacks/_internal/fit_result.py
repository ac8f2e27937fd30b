"""`FitResult`: the result of a fit without its controller, in copies of a callback and across processes."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
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

_NUMBERS = ("phase", "density", "final_density", "flops_ratio", "flops_executed_ratio", "flops", "schedule")


@dataclass(frozen=True)
class FitResult:
    """Result of a fit, with some of `DGMController`'s properties and methods, and without its model and optimizers."""

    phase: str
    density: float
    final_density: float
    flops_ratio: float
    flops_executed_ratio: float
    flops: dict[str, float]
    schedule: Schedule
    outcome: dict[str, Any]
    _state: dict[str, Any]
    _decisions: tuple[LayerDecision, ...]
    _masks: dict[str, Tensor]

    @classmethod
    def of(cls, controller: DGMController, state: dict[str, Any], outcome: Mapping[str, Any]) -> FitResult:
        """Return the result of a controller's run so far; if weights are sharded, call it on every rank.

        Args:
            controller: controller of the fit.
            state: its state, and the callback's own.
            outcome: result of `RunOutcome.summary`.

        """
        return cls(
            outcome=dict(outcome),
            _state=state,
            _decisions=controller.decisions(),
            _masks=controller.masks(),
            **{name: getattr(controller, name) for name in _NUMBERS},
        )

    @classmethod
    def from_plain(cls, content: Mapping[str, Any], config: DGMConfig) -> FitResult:
        """Return the result that `plain` was called of."""
        own = dict(content)
        return cls(
            schedule=config.schedule.resolve(own["_state"]["total_steps"]),
            _decisions=tuple(LayerDecision(**decision) for decision in own.pop("_decisions")),
            **own,
        )

    def plain(self) -> dict[str, Any]:
        """Return the content in plain types and tensors, which load with ``weights_only=True``."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "schedule"}
        return content | {"_decisions": [asdict(decision) for decision in self._decisions]}

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return the decision for every linear and convolution layer."""
        return self._decisions

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's mask over units."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state."""
        return self._state


class FitResultFile:
    """Temporary file that brings the result of a fit back to the process that called ``trainer.fit``.

    Lightning brings back the weights in the same way, but nothing of a callback.
    """

    def __init__(self) -> None:
        self._made_in = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"lightning_estdgm-{uuid.uuid4().hex}.pt"
        self._result: FitResult | None = None
        weakref.finalize(self, _remove_by_maker, self._path, self._made_in)

    def leave(self, trainer: pl.Trainer, result: Callable[[], FitResult]) -> None:
        """Write the result of a fit; call it on every rank. Does nothing in the process that made this object."""
        if os.getpid() == self._made_in or not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            return
        content = result().plain()  # on every rank
        if trainer.is_global_zero:
            torch.save(content, self._path)

    def result(self, config: DGMConfig) -> FitResult | None:
        """Return the result of the last fit in other processes, or None."""
        if os.getpid() == self._made_in and self._path.exists():
            content = torch.load(self._path, weights_only=True)
            self._path.unlink()
            self._result = FitResult.from_plain(content, config)
        return self._result


def _remove_by_maker(path: Path, made_in: int) -> None:
    if os.getpid() == made_in:
        path.unlink(missing_ok=True)
