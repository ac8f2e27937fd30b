"""`BlockSlices`: the active blocks of a weight as slices of its memory, copied out and in without the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import PIECE, expand_mask


@dataclass(frozen=True, eq=False)
class BlockSlices:
    """Positions of the active blocks of one weight in its memory.

    A block of a row-major ``(out, in)`` matrix is ``block_size`` slices of as many elements; a convolution's kernels
    lengthen them, or in channels-last memory multiply them.

    Attributes:
        order: dimensions of the weight from the outermost in memory to the innermost.
        length: number of elements of a slice.
        index: positions of the active slices among all slices in memory, int64 ``[slices]``, ascending.

    """

    order: tuple[int, ...]
    length: int
    index: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, block_size: int) -> BlockSlices | None:
        """Return the slices of the active blocks, or None if the weight's memory has gaps.

        Args:
            weight: weight ``(out, in, ...)`` of any strides.
            mask: block mask, bool ``(out / block_size, in / block_size)``.
            block_size: side of a block.

        """
        strides = weight.stride()
        order = tuple(sorted(range(weight.dim()), key=strides.__getitem__, reverse=True))
        if not weight.permute(order).is_contiguous():
            return None
        length = 1
        for dim in reversed(order):
            if dim < 2:
                length *= block_size
                break
            length *= weight.shape[dim]
        whole = expand_mask(mask, block_size)[(...,) + (None,) * (weight.dim() - 2)].expand(weight.shape).permute(order)
        index = whole.reshape(-1, length)[:, 0].nonzero().squeeze(1).to(weight.device)
        return cls(order, length, index)

    def fit(self, weight: Tensor) -> bool:
        """Whether a weight of the same shape has the device and memory layout that the slices were made for."""
        return weight.device == self.index.device and weight.permute(self.order).is_contiguous()

    def read(self, weight: Tensor, *, into: Tensor | None = None) -> Tensor:
        """Return a copy of the active blocks, ``[slices, length]``, in `into` if that is given."""
        if into is None:
            return self._all(weight).index_select(0, self.index)
        return torch.index_select(self._all(weight), 0, self.index, out=into)

    def scale_step_(self, weight: Tensor, before: Tensor, scale: float) -> None:
        """Make the step that led from `before` to the active blocks `scale` times as large, in place."""
        slices = self._all(weight)
        piece = max(1, PIECE // self.length) if weight.device.type == "cpu" else max(1, len(self.index))
        for index, old in zip(self.index.split(piece), before.split(piece), strict=True):
            slices.index_copy_(0, index, slices.index_select(0, index).lerp_(old, 1.0 - scale))

    def _all(self, weight: Tensor) -> Tensor:
        return weight.permute(self.order).view(-1, self.length)
