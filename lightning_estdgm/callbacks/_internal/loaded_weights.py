"""Weights that something loads into the model in mid-run, such as the best ones so far."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_estdgm._words import first_names
from lightning_estdgm.engine._controller import DGMController
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
        self._candidates = {candidate.module: candidate for candidate in controller.candidates}
        self._loaded: dict[nn.Module, int] = {}  # torch's count of writes to the weight as it was loaded
        self._handles = [
            candidate.module.register_load_state_dict_post_hook(OwnHook(self._note))
            for candidate in controller.candidates
            if controller.config.storage != "packed"
        ]

    def _note(self, module: nn.Module, incompatible: Any) -> None:
        self._loaded[module] = self._candidates[module].weight._version

    def say(self) -> None:
        """Warn of layers that were loaded since the last call. Call it before anything is zeroed, and before a step."""
        names = self.exceeding()
        self._loaded.clear()
        if names:
            rank_zero_warn(
                f"weights were loaded in mid-run, and in {len(names)} layers ({first_names(names)}) they are not zero "
                "outside the masks, as those of an earlier step: DGMCallback zeroes them there, since its masks follow "
                "the schedule. The model is not the one that was saved. To go on with a checkpoint's masks, begin a "
                "fit with ckpt_path="
            )

    def exceeding(self, *, as_loaded: bool = False) -> list[str]:
        """Return the names of layers that were loaded since the last `say`, and are not zero outside the masks.

        Args:
            as_loaded: whether layers are left out that were written to since.

        """
        weights = [w for w in self._controller.masked_weights if w.candidate.module in self._loaded]
        if as_loaded:
            weights = [w for w in weights if w.parameter._version == self._loaded[w.candidate.module]]
        return [w.name for w in weights if w.exceeds_mask()]

    def close(self) -> None:
        """Remove the hooks. May be called twice."""
        for handle in self._handles:
            handle.remove()


def say_foreign(controller: DGMController) -> None:
    """Warn of a checkpoint whose weights are not those of its masks. Call it before anything is zeroed.

    Args:
        controller: controller of the resumed run.

    """
    names = [weight.name for weight in controller.masked_weights if weight.exceeds_mask()]
    if names:
        rank_zero_warn(
            f"the checkpoint's weights are not zero outside its masks in {len(names)} layers ({first_names(names)}): "
            "they are not those that the run had: it was saved while others were loaded, as by "
            "trainer.test(ckpt_path=...), or they were exchanged in the file. DGMCallback zeroes them there. To go on "
            "from other weights, load them and begin a fit without ckpt_path="
        )
