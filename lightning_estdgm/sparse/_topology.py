"""Active blocks of a weight matrix as the index lists that every sparse operator walks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import BlockSize, block_size_of, expand_mask, sides


@dataclass(frozen=True, eq=False)
class BlockTopology:
    """Active blocks of an ``(out, in)`` matrix: block CSR and the index lists of its transpose.

    Blocks are ``b x b`` weights, or ``h x w``. Block ``(r, c)`` covers rows ``r*h .. (r+1)*h`` and columns
    ``c*w .. (c+1)*w``. Row ``r`` holds the blocks ``col_idx[row_ptr[r] : row_ptr[r+1]]`` and column ``c`` the blocks
    ``row_idx[col_ptr[c] : col_ptr[c+1]]``, ascending. The index lists have room for every block, so another mask is
    written in place (:meth:`update_`): the tensors stay the same objects of the same shapes, and a compiled graph that
    reads them needs no recompilation. Those of a compact topology hold the active blocks alone: 8 bytes for each of
    these instead of for each block; they stay the same objects, of another length.

    Args:
        block_size: Side ``b >= 1`` of a block, in weights, or the pair ``(h, w)`` where it is no square.
        block_rows: Number ``R`` of block rows (``out / h``).
        block_cols: Number ``C`` of block columns (``in / w``).
        row_ptr: int32 ``[R+1]``, start of each block row in ``col_idx``.
        col_idx: int32 ``[R*C]``, block columns, row-major; only the first ``nnz`` entries mean anything, and there may
            be no others.
        col_ptr: int32 ``[C+1]``, start of each block column in ``row_idx``.
        row_idx: int32, as long as `col_idx`, block rows, column-major; likewise.
        compact: Whether :meth:`update_` keeps no room for inactive blocks.

    Raises:
        ValueError: A size is below 1, a tensor has the wrong shape or dtype, or tensors are on different devices.

    Source: block CSR with transpose metadata as in stk / MegaBlocks (arXiv 2211.15841).

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[True, False], [True, True]]), block_size=16)
        >>> topology.shape, topology.nnz, topology.density
        ((32, 32), 3, 0.75)
    """

    block_size: BlockSize
    block_rows: int
    block_cols: int
    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    compact: bool = False

    def __post_init__(self) -> None:
        if min(self.sides) < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        for name in ("block_rows", "block_cols"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # Shorter lists are those of a compact topology, also where an operator puts it together again.
        entries = min(self.col_idx.numel(), self.block_rows * self.block_cols)
        for name, length in (
            ("row_ptr", self.block_rows + 1),
            ("col_idx", entries),
            ("col_ptr", self.block_cols + 1),
            ("row_idx", entries),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != (length,):
                raise ValueError(
                    f"{name} must be int32 of shape ({length},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if tensor.device != self.row_ptr.device:
                raise ValueError(
                    f"all index tensors must be on one device: row_ptr is on {self.row_ptr.device}, "
                    f"{name} on {tensor.device}"
                )

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: BlockSize, *, compact: bool = False) -> BlockTopology:
        """Topology of a block mask, on the mask's device.

        Args:
            mask: Bool ``[R, C]``, true where the block is active.
            block_size: Side ``b`` of a block, or its rows and columns ``(h, w)``, in weights.
            compact: Whether the index lists hold the active blocks alone.

        Raises:
            TypeError: ``mask`` is no bool tensor, or ``block_size`` no int and no pair of them.
            ValueError: ``mask`` is not 2-D or is empty, or ``block_size`` is below 1.
        """
        _check_mask(mask)
        if any(type(side) is not int for side in sides(block_size)):
            raise TypeError(f"block_size must be an int or a pair of them, got {block_size!r}")
        block_size = block_size_of(*sides(block_size))
        rows, cols = mask.shape
        if rows < 1 or cols < 1:
            raise ValueError(f"mask must have at least one block in each direction, got shape {tuple(mask.shape)}")

        def empty(length: int) -> Tensor:
            return torch.zeros(length, dtype=torch.int32, device=mask.device)

        room = 0 if compact else rows * cols
        lists = empty(rows + 1), empty(room), empty(cols + 1), empty(room)
        topology = cls(block_size, rows, cols, *lists, compact)
        topology.update_(mask)
        return topology

    def update_(self, mask: Tensor) -> None:
        """Replace the active blocks in place: unless compact, nothing is allocated for keeps and no shape changes.

        A graph built before this call can no longer be run backward: autograd raises, since its saved indices
        changed under it.

        Args:
            mask: Bool ``[R, C]``, true where the block is active; any device.

        Raises:
            TypeError: ``mask`` is no bool tensor.
            ValueError: ``mask`` has another shape than ``[R, C]``.
        """
        _check_mask(mask)
        if tuple(mask.shape) != (self.block_rows, self.block_cols):
            raise ValueError(f"mask must have shape ({self.block_rows}, {self.block_cols}), got {tuple(mask.shape)}")
        mask = mask.detach()
        for grid, ptr, idx in ((mask, self.row_ptr, self.col_idx), (mask.t(), self.col_ptr, self.row_idx)):
            ptr[1:].copy_(grid.sum(1).cumsum(0))
            if self.compact or (mask.device.type == "cpu" and type(mask) is Tensor):  # a FakeTensor has no values
                active = grid.contiguous().nonzero()[:, 1]
                if self.compact:
                    idx.resize_(active.shape)
                idx[: len(active)].copy_(active)
                idx[len(active) :].zero_()
                continue
            # A stable sort puts the active blocks first, in reading order, with no wait for the device.
            order = (~grid).flatten().to(torch.uint8).argsort(stable=True)
            idx.copy_(order.remainder_(grid.shape[1]))

    def mask(self) -> Tensor:
        """Block mask, bool ``[R, C]``: the inverse of :meth:`from_mask`."""
        device = self.row_ptr.device
        counts = self.row_ptr.diff().long()
        rows = torch.repeat_interleave(torch.arange(self.block_rows, device=device), counts)
        out = torch.zeros(self.block_rows, self.block_cols, dtype=torch.bool, device=device)
        out[rows, self.col_idx[: rows.numel()].long()] = True
        return out

    def weight_mask(self) -> Tensor:
        """Mask of the weights, bool ``(out, in)``: each block's flag repeated over its weights."""
        return expand_mask(self.mask(), self.block_size)

    def mask_over(self, shape: Sequence[int]) -> Tensor:
        """Mask that broadcasts over a weight ``(out, in, ...)``, also where this is that of ``(out, in * taps)``."""
        mask = self.weight_mask()
        if mask.shape[1] != shape[1]:
            return mask.view(*shape)
        return mask.view(*mask.shape, *[1] * (len(shape) - 2))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> BlockTopology:
        """Topology of the same blocks on what `fn` makes of each index list, such as a copy on another device."""
        lists = fn(self.row_ptr), fn(self.col_idx), fn(self.col_ptr), fn(self.row_idx)
        return BlockTopology(self.block_size, self.block_rows, self.block_cols, *lists, self.compact)

    def transpose(self) -> BlockTopology:
        """Topology of the transposed matrix. It shares this one's tensors, so it follows :meth:`update_`."""
        return BlockTopology(
            block_size_of(*self.sides[::-1]),
            self.block_cols,
            self.block_rows,
            self.col_ptr,
            self.row_idx,
            self.row_ptr,
            self.col_idx,
            self.compact,
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a block, in weights."""
        return sides(self.block_size)

    @property
    def side(self) -> int:
        """Side of a square block, in weights: for backends that have no others.

        Raises:
            ValueError: Blocks are no squares.
        """
        rows, columns = self.sides
        if rows != columns:
            raise ValueError(f"blocks are {rows} x {columns}, no squares")
        return rows

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the weight matrix."""
        rows, columns = self.sides
        return self.block_rows * rows, self.block_cols * columns

    @property
    def nnz(self) -> int:
        """Number of active blocks (waits for the device)."""
        return int(self.row_ptr[-1])

    @property
    def density(self) -> float:
        """Active share of the blocks, in [0, 1] (waits for the device)."""
        return self.nnz / (self.block_rows * self.block_cols)

    @property
    def device(self) -> torch.device:
        """Device of the index lists."""
        return self.row_ptr.device


def _check_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got dtype {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be 2-D (block rows, block columns), got shape {tuple(mask.shape)}")
