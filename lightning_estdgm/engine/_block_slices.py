"""Active blocks of a weight as slices of adjacent elements of its storage: copied out and in without the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import expand_mask

_PIECE = 1 << 18  # elements: what stays in a CPU's cache between reading and writing


@dataclass(frozen=True, eq=False)
class BlockSlices:
    """Positions of the active blocks of one weight in its memory.

    A block of a row-major ``(out, in)`` matrix is ``block_size`` slices of as many elements; a convolution's kernels
    lengthen them, or in channels-last memory multiply them.

    Attributes:
        order: dimensions of the weight from the outermost in memory to the innermost.
        length: number of elements of a slice.
        index: int64 ``[slices]``, ascending: active ones of all slices in memory.

    """

    order: tuple[int, ...]
    length: int
    index: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, block_size: int) -> BlockSlices | None:
        """Return the slices of the blocks that `mask` has, or None where the weight leaves gaps in its memory.

        Args:
            weight: ``(out, in, ...)``, any strides.
            mask: bool ``(out / block_size, in / block_size)``.
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
        """Whether a weight of the same shape lies in memory as the one did that these were made of."""
        return weight.device == self.index.device and weight.permute(self.order).is_contiguous()

    def read(self, weight: Tensor, *, into: Tensor | None = None) -> Tensor:
        """Return a copy of the active blocks, ``[slices, length]``; written to `into` where that is given."""
        if into is None:
            return self._all(weight).index_select(0, self.index)
        return torch.index_select(self._all(weight), 0, self.index, out=into)

    def scale_step_(self, weight: Tensor, before: Tensor, scale: float) -> None:
        """Make the step of the active blocks since they were `before` `scale` times as large, in place."""
        slices = self._all(weight)
        piece = max(1, _PIECE // self.length) if weight.device.type == "cpu" else max(1, len(self.index))
        for index, old in zip(self.index.split(piece), before.split(piece), strict=True):
            slices.index_copy_(0, index, slices.index_select(0, index).lerp_(old, 1.0 - scale))

    def _all(self, weight: Tensor) -> Tensor:
        return weight.permute(self.order).view(-1, self.length)
