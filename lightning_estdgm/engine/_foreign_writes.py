"""`ForeignWrites`: masks hold for what anything but an optimizer's step has written to masked weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._own_hook import OwnHook


class ForeignWrites:
    """Writes to masked weights by hand-made averages, noise, clipping and the like.

    Torch counts the writes to a parameter, and its count is read for nothing. It counts none through ``weight.data``:
    on a CPU these are looked for at one inactive place of one weight a call, in turn. Once found, or wherever weights
    leave the run, as in `state_dict`, every weight is masked. Sharded weights are left to the next step.

    Args:
        model: model whose `state_dict` is masked.
        weights: function that returns the masked weights of now.

    """

    def __init__(self, model: nn.Module, weights: Callable[[], Sequence[MaskedWeight]]) -> None:
        self._weights = weights
        self._turn = -1
        self._uncounted = False  # whether a write was found that torch had not counted
        self._handle: Any = model.register_state_dict_pre_hook(OwnHook(lambda *_: self.mask(every=True)))

    @torch.no_grad()
    def mask(self, *, every: bool = False) -> None:
        """Zero inactive weights that were written to.

        Args:
            every: whether torch's count is not relied on, and all weights are read.

        """
        weights = self._weights()
        if not self._uncounted:
            self._look(weights if every else self._next_of(weights))
        for weight in weights:
            weight.mask_if_written_(surely=every or self._uncounted)

    def close(self) -> None:
        """Remove the hook. May be called twice."""
        self._handle.remove()

    def _next_of(self, weights: Sequence[MaskedWeight]) -> Sequence[MaskedWeight]:
        here = [weight for weight in weights if weight.device.type == "cpu"]  # a look elsewhere waits for the device
        self._turn += 1
        return [here[self._turn % len(here)]] if here else []

    def _look(self, weights: Sequence[MaskedWeight]) -> None:
        found = next((weight for weight in weights if weight.is_written_uncounted()), None)
        if found is not None:
            self._uncounted = True
            warnings.warn(
                f"layer {found.name!r}: something wrote to its inactive weights through `.data`, which torch does not "
                "count. From now on all weights are masked before each batch; until now some batches may have "
                "computed with what was written. Writes in `torch.no_grad()` are counted (said once)",
                RuntimeWarning,
                stacklevel=5,
            )
