# mypy: disable-error-code="no-untyped-def"
"""Dealing of a weight gradient's active blocks to programs, and the second stage of split sums.

A unit is up to ROWS / INNER active blocks (of BLOCK outputs x INNER inputs) of one block row; units are numbered row by
row. An item is one tap of one unit (a linear layer has one tap). Where items are few, the sum over tokens or pixels is
split into parts.
Importing this module imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton._tiles import Tiles

MIN_STEPS = 8
"""Steps over the tokens below which a weight gradient is not split further."""

MAX_SPLITS = 16

WAVES = 2
"""A weight gradient is split only if all parts run in this many waves: bounds the memory of partial sums."""

CHUNK = 1024
"""Block rows counted at once when a program looks for its block row."""


@triton.jit
def units_before(row_ptr, block_rows, unit, JOIN: tl.constexpr, CHUNK: tl.constexpr):
    """Count whole block rows of units up to `unit`, the units in them, and all units. JOIN: blocks in a unit."""
    rows = 0
    before = 0
    total = 0
    for start in range(0, block_rows, CHUNK):
        r = start + tl.arange(0, CHUNK)
        inside = r < block_rows
        first = tl.load(row_ptr + r, mask=inside, other=0)
        stop = tl.load(row_ptr + r + 1, mask=inside, other=0)
        units = (stop - first + JOIN - 1) // JOIN
        passed = inside & (total + tl.cumsum(units, 0) <= unit)
        rows += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, units, 0), 0)
        total += tl.sum(units, 0)
    return rows, before, total


@triton.jit
def unit_blocks(row_ptr, block_rows, unit, JOIN: tl.constexpr, CHUNK: tl.constexpr):
    """Block row of a unit, and its slots ``[first, stop)`` in ``col_idx``."""
    row, before, _ = units_before(row_ptr, block_rows, unit, JOIN, CHUNK)
    first = tl.load(row_ptr + row) + (unit - before) * JOIN
    return row, first, tl.minimum(first + JOIN, tl.load(row_ptr + row + 1))


@triton.jit
def unit_columns(col_idx, first, stop, i, INNER: tl.constexpr):
    """Columns of the weight (in elements) that rows `i` of a unit's tile stand for, and which of them exist."""
    slot = first + i // INNER
    exists = slot < stop
    cols = tl.load(col_idx + slot, mask=exists, other=0) * INNER + i % INNER
    return tl.max_contiguous(tl.multiple_of(cols, INNER), INNER), exists


@triton.jit
def split_count(items, steps, programs, MIN_STEPS: tl.constexpr, MAX_SPLITS: tl.constexpr, WAVES: tl.constexpr):
    """In how many parts the sum is cut so that the programs are evenly busy: the fewest waves of work."""
    best = 1
    waves = tl.cdiv(items, programs)
    for splits in range(2, MAX_SPLITS + 1):
        needed = tl.cdiv(items * splits, programs)
        fits = (splits * MIN_STEPS <= steps) & (needed <= WAVES)
        better = fits & (8 * needed * best < 7 * waves * splits)  # an eighth less time pays for the second stage
        best = tl.where(better, splits, best)
        waves = tl.where(better, needed, waves)
    return best


@triton.jit(do_not_specialize=["length", "block_rows"])
def _sum_parts_kernel(
    dw_ptr,
    partial_ptr,
    row_ptr,
    col_idx,
    length,
    block_rows,
    stride_dwn,
    stride_dwk,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
):
    """Each item's partial sums, added in order; nothing where the sum was not split. ``dw [out, TAPS, in]``."""
    JOIN: tl.constexpr = ROWS // INNER
    PIECE: tl.constexpr = 2048 if ROWS * BLOCK > 2048 else ROWS * BLOCK
    PIECES: tl.constexpr = ROWS * BLOCK // PIECE
    programs = tl.num_programs(0)
    _, _, units = units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    items = units * TAPS
    splits = split_count(items, tl.cdiv(length, DEPTH), programs, MIN_STEPS, MAX_SPLITS, WAVES)
    if splits > 1:
        for work in range(tl.program_id(0), items * PIECES, programs):
            item = work // PIECES
            row, first, stop = unit_blocks(row_ptr, block_rows, item // TAPS, JOIN, CHUNK)
            i = work % PIECES * PIECE + tl.arange(0, PIECE)
            acc = tl.zeros((PIECE,), tl.float32)
            for part in range(splits):
                acc += tl.load(partial_ptr + (part * items + item) * (ROWS * BLOCK) + i)
            cols, exists = unit_columns(col_idx, first, stop, i % ROWS, INNER)
            n = row * BLOCK + i // ROWS
            dw = dw_ptr + (n.to(tl.int64) * TAPS + item % TAPS) * stride_dwn + cols.to(tl.int64) * stride_dwk
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class Deal:
    """Launch of a weight gradient.

    Attributes:
        programs: Number of programs.
        partial: Room, float32 ``[parts, BLOCK, ROWS]``, for partial sums; without parts where nothing is ever split.
        taps: Number of taps of the kernel.
        cut: Constants that both stages share.
    """

    programs: int
    partial: Tensor
    taps: int
    cut: dict[str, Any]

    def add_parts(self, dw: Tensor, strides: tuple[int, ...], length: int, topology: BlockTopology) -> None:
        """Second stage: write the sums of the parts into ``dw``.

        Args:
            dw: Gradient, ``[out, taps, in]``.
            strides: Steps in memory from a tap of an output to the next one, and from an input to the next.
            length: Number of tokens or pixels that were summed over.
            topology: Active blocks of the weight.
        """
        if self.partial.shape[0]:
            _sum_parts_kernel[(self.programs,)](
                dw,
                self.partial,
                topology.row_ptr,
                topology.col_idx,
                length,
                topology.block_rows,
                *strides,
                TAPS=self.taps,
                enable_fp_fusion=True,
                **self.cut,
            )


def deal(length: int, topology: BlockTopology, tiles: Tiles, device: torch.device, taps: int = 1) -> Deal:
    """Deal out a weight gradient.

    Args:
        length: Number of tokens or pixels that are summed over, at least 1.
        topology: Active blocks of the weight; nothing is read of it but sizes.
        tiles: Cut of the work.
        device: Device that it runs on.
        taps: Number of taps of the kernel.
    """
    b, inner = topology.sides
    capacity = topology.block_rows * triton.cdiv(topology.block_cols * inner, tiles.rows) * taps
    may_split = triton.cdiv(length, tiles.depth) >= 2 * MIN_STEPS
    programs = launch.multiprocessors(device) * tiles.resident(b)
    parts = min(WAVES * programs, MAX_SPLITS * capacity) if may_split else 0
    cut = {
        "BLOCK": b,
        "INNER": inner,
        "ROWS": tiles.rows,
        "DEPTH": tiles.depth,
        "CHUNK": min(CHUNK, triton.next_power_of_2(topology.block_rows)),
        "MIN_STEPS": MIN_STEPS,
        "MAX_SPLITS": MAX_SPLITS,
        "WAVES": WAVES,
    }
    partial = torch.empty(parts, b, tiles.rows, dtype=torch.float32, device=device)
    return Deal(programs if may_split else min(programs, capacity), partial, taps, cut)
