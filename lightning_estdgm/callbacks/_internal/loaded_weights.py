"""Weights that something loads into the model in mid-run, such as the best ones so far."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_estdgm._words import first_names
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._own_hook import OwnHook


class LoadedWeights:
    """Watches `load_state_dict` of the masked layers, and says if what was loaded does not fit the masks.

    Masks follow the schedule, so of the weights of an earlier step those outside are lost. Sharded and packed weights
    are not looked at.

    Args:
        controller: controller of the run.

    """

    def __init__(self, controller: DGMController) -> None:
        self._controller = controller
        self._loaded: set[nn.Module] = set()
        self._handles = [
            candidate.module.register_load_state_dict_post_hook(OwnHook(self._note))
            for candidate in controller.candidates
            if controller.config.storage != "packed"
        ]

    def _note(self, module: nn.Module, incompatible: Any) -> None:
        self._loaded.add(module)

    def say(self) -> None:
        """Warn of layers that were loaded since the last call. Call it before anything is zeroed, and before a step."""
        if not self._loaded:
            return
        loaded, self._loaded = self._loaded, set()
        weights = [weight for weight in self._controller.masked_weights if weight.candidate.module in loaded]
        names = [weight.name for weight in weights if _exceeds_mask(weight)]
        if names:
            rank_zero_warn(
                f"weights were loaded in mid-run, and in {len(names)} layers ({first_names(names)}) they are not zero "
                "outside the masks, as those of an earlier step: DGMCallback zeroes them there, since its masks follow "
                "the schedule. The model is not the one that was saved. To go on with a checkpoint's masks, begin a "
                "fit with ckpt_path="
            )

    def close(self) -> None:
        """Remove the hooks. May be called twice."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def _exceeds_mask(weight: MaskedWeight) -> bool:
    if weight.is_dense or not weight.is_zero_outside:
        return False
    masked = weight.weight.clone()
    weight.fill_inactive_(masked)
    return not torch.equal(masked, weight.weight)
