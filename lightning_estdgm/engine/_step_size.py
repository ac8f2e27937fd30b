"""`WeightSnapshot`: a weight before an optimizer's step, from which the step is scaled or undone. See `StepSize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_estdgm.engine._block_slices import BlockSlices
from lightning_estdgm.method._masks import masked_select_units

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight

FEW = 1 / 3
"""Largest density at which copying the active blocks alone takes less time than copying the weight."""


class WeightSnapshot:
    """One weight as it was before a step of its optimizer: all of it, or its active blocks if those are few.

    Attributes:
        values: copy of the weight or of its active blocks; ``None`` before `take`.
        slices: active blocks that `values` holds; ``None`` if it holds the whole weight.

    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.slices: BlockSlices | None = None

    def take(self, weight: MaskedWeight, *, active_only: bool) -> None:
        """Copy the weight as it is now; with `active_only`, its inactive units may be left out."""
        self.slices = self._few_slices(weight) if active_only else None
        if self.slices is not None:
            self.values = self.slices.read(weight.weight, into=self.values)
        elif self.values is None:
            self.values = weight.weight.clone()
        else:
            self.values.copy_(weight.weight)

    def forget(self) -> None:
        """Drop the copy and free its memory."""
        self.slices = self.values = None

    def scale_step_(self, weight: MaskedWeight, scale: float) -> None:
        """Make the step that the weight has made since `take` `scale` times as large, in place."""
        if self.values is None or scale == 1.0:
            return
        if self.slices is None:
            weight.weight.lerp_(self.values, 1.0 - scale)
        else:
            self.slices.scale_step_(weight.weight, self.values, scale)

    def undo_inactive_(self, weight: MaskedWeight) -> None:
        """Give inactive weights the values that they had at `take`, in place."""
        if self.values is not None:
            active, grain = weight.addressed_mask, weight.placement.grain
            weight.weight.copy_(masked_select_units(active, weight.weight, self.values, grain))

    def _few_slices(self, weight: MaskedWeight) -> BlockSlices | None:
        """Return the active blocks' slices if the weight is whole and copying them alone pays."""
        if weight.placement.is_sharded or weight.block_size == 1 or weight.density > FEW:
            return None
        if self.slices is None or not self.slices.fit(weight.weight):
            self.values = None
            return BlockSlices.of(weight.weight, weight.mask, weight.block_size)
        return self.slices
