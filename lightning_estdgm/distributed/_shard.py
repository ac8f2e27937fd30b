"""How one weight lies over ranks: `Shard`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Shard(Protocol):
    """How this rank's part of one weight lies in the whole weight.

    "Local" tensors have the shape of this rank's part, oriented ``(out, in, ...)`` where the part is a box, flat where
    it is a range; "whole" ones have the weight's shape ``(out, in, ...)``; masks over units are always whole, but for
    single weights (``block_size=1``) of a sharded weight, which have local masks.

    Attributes:
        shape: of the whole weight, ``(out, in, ...)``.
        groups: process groups that the weight is spread over, in the order to reduce in; ``()`` where it is whole.
        device: that collectives run on.
        why_dense: why the layer's forward cannot use a sparse operator, in words; ``""`` where it can.

    """

    shape: tuple[int, ...]
    groups: tuple[Any, ...]
    device: torch.device
    why_dense: str

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` (a gradient, or optimizer state) lies over the ranks as this weight does."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the local part of a parameter, gradient or optimizer state that lies like it; shares its storage."""
        ...

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy of the local part of a tensor of the whole weight's shape, on `whole`'s device."""
        ...

    def spread(self, local: Tensor) -> Tensor:
        """Return a tensor of the whole weight's shape, ``local`` in its place and 0 elsewhere."""
        ...

    def index(self, device: torch.device) -> Tensor:
        """Return the position of each local element in the flattened whole weight, int64, in the local shape."""
        ...

    def expand(self, units: Tensor, block_size: int) -> Tensor:
        """Return a mask over units as one that addresses local tensors at a grain of `grain` (it may broadcast)."""
        ...

    def grain(self, block_size: int) -> int:
        """Return the block size with which `expand`'s masks address local tensors: 1 unless the weight is whole."""
        ...

    def pool(self, squares: Tensor, block_size: int) -> Tensor:
        """Sum a local tensor over each unit; units that other ranks hold too are theirs to add. Of the mask's shape."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on `device` over the ranks that the weight is spread over, in place."""
        ...


def pool_box(box: Tensor, offset: Sequence[int], unit: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Sum a box of a matrix over the units of the whole matrix.

    Args:
        box: ``(rows, columns)``, maybe empty.
        offset: row and column of its first element in the whole.
        unit: rows and columns of a unit.
        shape: of the whole; units divide it.

    Returns:
        ``(shape[0] / unit[0], shape[1] / unit[1])``; 0 where the box is not.

    """
    out = box.new_zeros(shape[0] // unit[0], shape[1] // unit[1])
    if box.numel() == 0:
        return out
    before = [offset[d] % unit[d] for d in (0, 1)]
    after = [-(offset[d] + box.shape[d]) % unit[d] for d in (0, 1)]
    if any(before + after):
        box = F.pad(box, (before[1], after[1], before[0], after[0]))
    first = [offset[d] // unit[d] for d in (0, 1)]
    rows, columns = box.shape[0] // unit[0], box.shape[1] // unit[1]
    sums = box.unflatten(1, (columns, unit[1])).unflatten(0, (rows, unit[0])).sum((1, 3))
    out[first[0] : first[0] + rows, first[1] : first[1] + columns] = sums
    return out
