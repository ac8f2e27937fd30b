"""Masking of gradients before a module with manual optimization clips them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_estdgm.callbacks._internal.trainer_checks import grad_scale


class ManualClipping:
    """Has gradients masked before `LightningModule.clip_gradients` clips them, in manual optimization.

    In an observation window they stay whole until the step, and after a plain ``loss.backward()`` as well: the norm
    would be that of all units, and too small a step be taken by the active ones. In automatic optimization Lightning
    clips after its hook before a step. The function is that of the Trainer's precision plugin, for one fit.

    Args:
        trainer: the Trainer.
        mask: called with the optimizer and the factor that its gradients still carry.

    """

    def __init__(self, trainer: pl.Trainer, mask: Callable[[Optimizer, float], None]) -> None:
        self._plugin = plugin = trainer.precision_plugin
        clip = plugin.clip_gradients

        def masked_first(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            mask(optimizer, grad_scale(trainer))  # Lightning unscales later, in the step
            clip(optimizer, *args, **kwargs)

        plugin.clip_gradients = masked_first  # type: ignore[method-assign]

    def end(self) -> None:
        """Take it back. May be called twice."""
        vars(self._plugin).pop("clip_gradients", None)
