"""Active blocks of matrices of one shape that one parameter stacks, such as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import BlockSize, block_size_of, sides
from lightning_estdgm.sparse._operands import topology_arguments, topology_of
from lightning_estdgm.sparse._topology import BlockTopology


@dataclass(frozen=True, eq=False)
class ExpertTopology:
    """Active blocks of a stack ``(experts, out, in)``: index lists as of `BlockTopology`, a row for each expert.

    Another mask is written in place, so that a compiled graph that reads the lists needs no recompilation.

    Args:
        block_size: Side of a block, or its rows and columns, in weights.
        row_ptr: int32 ``[experts, R+1]``, for ``R`` block rows in one matrix.
        col_idx: int32 ``[experts, R*C]``, for ``C`` block columns.
        col_ptr: int32 ``[experts, C+1]``.
        row_idx: int32 ``[experts, R*C]``.

    Example:
        >>> topology = ExpertTopology.from_mask(torch.tensor([[True, False], [True, True]]), 2, block_size=16)
        >>> topology.shape, [expert.nnz for expert in topology.experts()]
        ((2, 16, 32), [1, 2])
    """

    block_size: BlockSize
    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, experts: int, block_size: BlockSize) -> ExpertTopology:
        """Topology of a block mask, on the mask's device.

        Args:
            mask: Bool ``[experts * R, C]``, the experts' masks one below the other.
            experts: Number of matrices.
            block_size: Side of a block, or its rows and columns, in weights.
        """
        each = [topology_arguments(BlockTopology.from_mask(part, block_size))[:4] for part in mask.chunk(experts)]
        return cls(block_size, *map(torch.stack, zip(*each, strict=True)))

    def expert(self, index: int) -> BlockTopology:
        """Topology of one expert's matrix; it shares this one's tensors."""
        row_ptr, col_idx, col_ptr, row_idx = (x[index] for x in self._lists())
        return topology_of(row_ptr, col_idx, col_ptr, row_idx, list(sides(self.block_size)))

    def experts(self) -> list[BlockTopology]:
        """Topology of each expert's matrix; they share this one's tensors."""
        return [self.expert(index) for index in range(self.row_ptr.shape[0])]

    def _lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.row_ptr, self.col_idx, self.col_ptr, self.row_idx

    def update_(self, mask: Tensor) -> None:
        """Replace the active blocks in place, by a mask of the same shape."""
        experts = self.experts()
        for topology, part in zip(experts, mask.chunk(len(experts)), strict=True):
            topology.update_(part)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> ExpertTopology:
        """Topology of the same blocks on what `fn` makes of each index list, such as a copy on another device."""
        return ExpertTopology(self.block_size, *map(fn, self._lists()))

    def transpose(self) -> ExpertTopology:
        """Topology of the transposed matrices; it shares this one's tensors."""
        block_size = block_size_of(*sides(self.block_size)[::-1])
        return ExpertTopology(block_size, self.col_ptr, self.row_idx, self.row_ptr, self.col_idx)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(experts, out, in)`` of the stack."""
        (experts, row_bounds), column_bounds = self.row_ptr.shape, self.col_ptr.shape[1]
        rows, columns = sides(self.block_size)
        return experts, (row_bounds - 1) * rows, (column_bounds - 1) * columns
