"""`Shard`: protocol of the layout of one weight over ranks. Implementations are in `adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.method._masks import BlockSize


class Shard(Protocol):
    """Layout of one weight over ranks: the place of this rank's part in the whole weight.

    "Local" tensors have the shape of this rank's part, oriented ``(out, in, ...)`` if the part is a box, flat if it is
    a range; "whole" ones have the weight's shape ``(out, in, ...)``. Masks over units are whole, except for single
    weights (``block_size=1``) of a sharded weight, whose masks are local.

    Attributes:
        shape: shape of the whole weight, ``(out, in, ...)``.
        groups: process groups that the weight is spread over, in the order of reductions; ``()`` if it is whole.
        device: device that collectives run on.
        why_dense: reason why the layer's forward cannot use a sparse operator, in words; ``""`` if it can.

    """

    shape: tuple[int, ...]
    groups: tuple[Any, ...]
    device: torch.device
    why_dense: str

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` (a gradient, or optimizer state) has this weight's layout over ranks."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the local part of the parameter, or of a gradient or optimizer state of its layout; shares storage."""
        ...

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy of the local part of a tensor of the whole weight's shape, on `whole`'s device."""
        ...

    def spread(self, local: Tensor) -> Tensor:
        """Return a tensor of the whole weight's shape with `local` in its place and 0 elsewhere."""
        ...

    def index(self, device: torch.device) -> Tensor:
        """Return the position of each local element in the flattened whole weight, int64, in the local shape."""
        ...

    def expand(self, units: Tensor, block_size: BlockSize) -> Tensor:
        """Return a mask over units in the form that addresses local tensors, at `grain`; it may broadcast."""
        ...

    def grain(self, block_size: BlockSize) -> BlockSize:
        """Return the block size at which masks from `expand` address local tensors: 1 unless the weight is whole."""
        ...

    def pool(self, squares: Tensor, block_size: BlockSize) -> Tensor:
        """Return the sum of a local tensor over each unit, of the mask's shape; shares of other ranks are left out."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on `device` over the ranks that the weight is spread over, in place."""
        ...


def pool_box(box: Tensor, offset: Sequence[int], unit: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Sum a box of a matrix over the units of the whole matrix.

    Args:
        box: part of the matrix, ``(rows, columns)``, possibly empty.
        offset: row and column of the box's first element in the whole matrix.
        unit: numbers of rows and columns of a unit.
        shape: shape of the whole matrix, a multiple of `unit`.

    Returns:
        Sums, ``(shape[0] / unit[0], shape[1] / unit[1])``; 0 for units outside the box.

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
