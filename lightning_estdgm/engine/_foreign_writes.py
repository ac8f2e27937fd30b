"""`ForeignWrites`: masks hold for what anything but an optimizer's step has written to masked weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._forward_watch import is_traced
from lightning_estdgm.modules._own_hook import OwnHook


class ForeignWrites:
    """Writes to masked weights by hand-made averages, noise, clipping and the like.

    Torch counts the writes to a parameter, and its count is read for nothing. It counts none through ``weight.data``:
    on a CPU these are looked for at one inactive place of one weight a call, in turn. Once found, every weight is
    masked at each call, and any weight where it leaves the run, in `state_dict`; not one that was just loaded, whose
    masks may follow. Sharded weights are left to the next step.
    """

    def __init__(self) -> None:
        self._turn = -1
        self._uncounted = False  # whether a write was found that torch had not counted
        self._handles: dict[MaskedWeight, tuple[Any, Any]] = {}
        self._loaded: dict[MaskedWeight, tuple[int, int]] = {}  # `MaskedWeight.version` of what was loaded last

    def watch(self, weights: Sequence[MaskedWeight]) -> None:
        """Mask these weights in `state_dict`, too."""
        for weight in weights:
            if weight not in self._handles:
                leave, load = OwnHook(partial(self._leave, weight)), OwnHook(partial(self._load, weight))
                module = weight.candidate.module
                self._handles[weight] = (
                    module.register_state_dict_pre_hook(leave),
                    module.register_load_state_dict_post_hook(load),
                )

    @torch.no_grad()
    def mask(self, weights: Sequence[MaskedWeight], *, every: bool = False) -> None:
        """Zero inactive weights that were written to.

        Args:
            weights: all that are masked.
            every: whether torch's count is not relied on, and all weights are read.

        """
        if not self._uncounted:
            self._look(weights if every else self._next_of(weights))
        for weight in weights:
            weight.mask_if_written_(surely=every or self._uncounted)

    def close(self) -> None:
        """Remove the hooks. May be called twice."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def _load(self, weight: MaskedWeight, *_: Any) -> None:
        self._loaded[weight] = weight.version

    @torch.no_grad()
    def _leave(self, weight: MaskedWeight, *_: Any) -> None:
        if is_traced() or self._loaded.get(weight) == weight.version:
            return
        if not self._uncounted:
            self._look([weight])
        weight.mask_if_written_(surely=True)

    def _next_of(self, weights: Sequence[MaskedWeight]) -> Sequence[MaskedWeight]:
        self._turn += 1
        here = [weights[self._turn % len(weights)]] if weights else []
        return [weight for weight in here if weight.device.type == "cpu"]  # another device would be waited for

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
