"""`RampGrown`: units that a mask update has grown take smaller steps at first, as SMET has them."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.engine._controller import DGMController


def controller_of(trainer: Trainer) -> DGMController:
    """Return the controller of a Trainer under way with one `DGMCallback`."""
    (callback,) = (c for c in trainer.callbacks if isinstance(c, DGMCallback))  # type: ignore[attr-defined]
    assert callback.controller is not None
    return callback.controller


class RampGrown(Callback):
    """Scales the k-th step of a grown weight by k / steps for its first `steps` steps.

    That is the linear warm-up of a regrown weight's learning rate. Its own count of steps, the other half of SMET, is
    the package's own. Source: Xiao et al., ICML 2026, arXiv 2606.00888; the length is this package's choice.

    Args:
        steps: length of the ramp.

    """

    is_first = True  # its end of a step comes before the mask update that may follow it

    def __init__(self, steps: int = 20) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run: no weight of the first masks was grown."""
        self._masks: dict[str, Tensor] = {}
        self._age: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._updates = 0

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Find what has grown since the last step, and note the values of what is on its ramp."""
        controller = controller_of(trainer)
        if not controller.updates:  # the first masks are drawn after the first step, which is no growth
            self._masks = _copied(controller)
        elif controller.updates != self._updates:
            old, self._masks, self._updates = self._masks, _copied(controller), controller.updates
            for name, mask in self._masks.items():
                age = self._age.setdefault(name, torch.full(mask.shape, self.steps, dtype=torch.int32))
                age[mask & ~old[name]] = 0
        self._before = {}
        for name, age in self._age.items():
            young = (age < self.steps).flatten().nonzero().squeeze(1)
            if len(young):
                self._before[name] = young, _weight(pl_module, name)[young].clone()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take back the part of the step that is too much."""
        for name, (young, before) in self._before.items():
            age, weight = self._age[name].view(-1), _weight(pl_module, name)
            age[young] += 1
            weight[young] = before + (age[young] / self.steps) * (weight[young] - before)


def _copied(controller: DGMController) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in controller.masks().items()}  # updates change masks in place


def _weight(module: LightningModule, name: str) -> Tensor:
    return module.get_parameter(f"{name}.weight").detach().view(-1)
