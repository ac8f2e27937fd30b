# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the block-sparse linear layer, and their launches. Importing this module imports Triton.

Both products reduce in float32 and in a fixed order, without atomics. Dense operands are read in place through their
strides; of the topology only device memory is read, so a launch never waits for the device and can be captured in a
CUDA graph that then follows masks updated in place.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_estdgm.ops.triton.tiles import Tiles
from lightning_estdgm.topology import BlockTopology

__all__ = ["INTERPRETED", "TOO_BIG", "grad_weight", "linear"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU: what TRITON_INTERPRET was when Triton was imported."""

TOO_BIG = (triton.runtime.errors.OutOfResources,)
"""Raised by a launch that wants more shared memory or registers than the device has."""

SWIZZLE = 8
"""Token tiles that share one sweep over the weight, so that both stay in the L2 cache."""

MIN_STEPS = 8
"""Steps over the tokens below which a weight gradient is not split further."""

MAX_SPLITS = 16

WAVES = 2
"""A weight gradient is split only if all parts run in this many waves: bounds the memory of partial sums."""

CHUNK = 1024
"""Block rows counted at once when a program looks for its block row."""


# ---- device functions


@triton.jit
def _units_before(row_ptr, block_rows, unit, JOIN: tl.constexpr, CHUNK: tl.constexpr):
    """Count whole block rows of units up to `unit`, the units in them, and all units.

    A unit is up to JOIN active blocks of one block row; units are numbered row by row.
    """
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
def _unit_blocks(row_ptr, block_rows, unit, JOIN: tl.constexpr, CHUNK: tl.constexpr):
    """Block row of a unit, and its slots ``[first, stop)`` in ``col_idx``."""
    row, before, _ = _units_before(row_ptr, block_rows, unit, JOIN, CHUNK)
    first = tl.load(row_ptr + row) + (unit - before) * JOIN
    return row, first, tl.minimum(first + JOIN, tl.load(row_ptr + row + 1))


@triton.jit
def _unit_columns(col_idx, first, stop, i, BLOCK: tl.constexpr):
    """Columns of the weight (in elements) that rows `i` of a unit's tile stand for, and which of them exist."""
    slot = first + i // BLOCK
    exists = slot < stop
    cols = tl.load(col_idx + slot, mask=exists, other=0) * BLOCK + i % BLOCK
    return tl.max_contiguous(tl.multiple_of(cols, BLOCK), BLOCK), exists


@triton.jit
def _splits(units, steps, programs, MIN_STEPS: tl.constexpr, MAX_SPLITS: tl.constexpr, WAVES: tl.constexpr):
    """In how many parts the tokens are cut so that the programs are evenly busy: the fewest waves of work."""
    best = 1
    waves = tl.cdiv(units, programs)
    for splits in range(2, MAX_SPLITS + 1):
        needed = tl.cdiv(units * splits, programs)
        fits = (splits * MIN_STEPS <= steps) & (needed <= WAVES)
        better = fits & (8 * needed * best < 7 * waves * splits)  # an eighth less time pays for the second stage
        best = tl.where(better, splits, best)
        waves = tl.where(better, needed, waves)
    return best


# ---- Y = X (W * M)^T + bias


@triton.jit(do_not_specialize=["tokens", "block_rows"])
def _linear_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    row_ptr,
    col_idx,
    tokens,
    block_rows,
    stride_xt,
    stride_xk,
    stride_wn,
    stride_wk,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS tokens of one block row of the output."""
    pid = tl.program_id(0)
    sweep = SWIZZLE * block_rows
    first_tile = pid // sweep * SWIZZLE
    tiles = tl.minimum(tl.cdiv(tokens, ROWS) - first_tile, SWIZZLE)
    tile = first_tile + pid % sweep % tiles
    row = pid % sweep // tiles

    t = tile * ROWS + tl.arange(0, ROWS)
    n = row * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    # Rows past the last token read the last one, and are never written.
    x_rows = x_ptr + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * stride_xt
    w_rows = w_ptr + n.to(tl.int64)[None, :] * stride_wn
    begin = tl.load(row_ptr + row)
    end = tl.load(row_ptr + row + 1)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    if DEPTH <= BLOCK:
        PARTS: tl.constexpr = BLOCK // DEPTH
        col = tl.load(col_idx + begin, mask=begin < end, other=0)
        for step in range(begin * PARTS, end * PARTS):
            cols = (col * BLOCK + step % PARTS * DEPTH + k).to(tl.int64)
            x = tl.load(x_rows + cols[None, :] * stride_xk)
            w = tl.load(w_rows + cols[:, None] * stride_wk)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            slot = (step + 1) // PARTS
            col = tl.load(col_idx + slot, mask=slot < end, other=0)
    else:  # several blocks in one step; those past the end of the block row count as zeros
        JOIN: tl.constexpr = DEPTH // BLOCK
        for first in range(begin, end, JOIN):
            slot = first + k // BLOCK
            exists = slot < end
            cols = tl.load(col_idx + slot, mask=exists, other=0) * BLOCK + k % BLOCK
            cols = tl.max_contiguous(tl.multiple_of(cols, BLOCK), BLOCK).to(tl.int64)
            x = tl.load(x_rows + cols[None, :] * stride_xk, mask=exists[None, :], other=0.0)
            w = tl.load(w_rows + cols[:, None] * stride_wk, mask=exists[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    y = y_ptr + t.to(tl.int64)[:, None] * (block_rows * BLOCK) + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=t[:, None] < tokens)


def linear(
    x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, tiles: Tiles, *, precision: str
) -> Tensor:
    """``Y = X (W * M)^T + bias``: ``[T, in] -> [T, out]``, ``T >= 1``.

    Args:
        x2d: ``[T, in]``, any strides.
        weight: ``(out, in)``, any strides.
        bias: ``[out]`` or None.
        topology: which blocks of the weight are active.
        tiles: how to cut the work.
        precision: of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    tokens = x2d.shape[0]
    y = x2d.new_empty(tokens, topology.shape[0])
    if bias is not None:
        bias = bias.contiguous()
    grid = (triton.cdiv(tokens, tiles.rows) * topology.block_rows,)
    with _on(x2d.device):
        _linear_kernel[grid](
            y,
            x2d,
            weight,
            bias,
            topology.row_ptr,
            topology.col_idx,
            tokens,
            topology.block_rows,
            *x2d.stride(),
            *weight.stride(),
            BLOCK=topology.block_size,
            DEPTH=tiles.depth,
            SWIZZLE=SWIZZLE,
            HAS_BIAS=bias is not None,
            **_options(tiles, x2d.dtype, precision),
        )
    return y


# ---- dW = (dY^T X) * M


@triton.jit(do_not_specialize=["tokens", "block_rows"])
def _grad_weight_kernel(
    dw_ptr,
    partial_ptr,
    dy_ptr,
    x_ptr,
    row_ptr,
    col_idx,
    tokens,
    block_rows,
    stride_dw,
    stride_dyt,
    stride_dyn,
    stride_xt,
    stride_xk,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: every so-many-th unit, ROWS columns by one block row of the gradient, for a range of tokens.

    A unit is up to ROWS / BLOCK active blocks of one block row. Where units are few, the tokens are split and partial
    sums go to ``partial_ptr [splits * units, BLOCK, ROWS]``. The tile is the gradient's transpose: its long side is the
    one that matrix units want long.
    """
    JOIN: tl.constexpr = ROWS // BLOCK
    programs = tl.num_programs(0)
    _, _, units = _units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    steps = tl.cdiv(tokens, DEPTH)
    splits = _splits(units, steps, programs, MIN_STEPS, MAX_SPLITS, WAVES)
    span = tl.cdiv(steps, splits) * DEPTH
    for work in range(tl.program_id(0), units * splits, programs):
        # Programs that run at a time read the same tokens.
        part = work // units
        row, first, stop = _unit_blocks(row_ptr, block_rows, work % units, JOIN, CHUNK)
        cols, exists = _unit_columns(col_idx, first, stop, tl.arange(0, ROWS), BLOCK)
        n = row * BLOCK + tl.arange(0, BLOCK)
        x_cols = x_ptr + cols.to(tl.int64)[:, None] * stride_xk
        dy_cols = dy_ptr + n.to(tl.int64)[None, :] * stride_dyn
        end = tl.minimum((part + 1) * span, tokens)
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(part * span, end, DEPTH):
            t = start + tl.arange(0, DEPTH)
            inside = t < end
            rows = t.to(tl.int64)
            x = tl.load(x_cols + rows[None, :] * stride_xt, mask=inside[None, :], other=0.0)
            dy = tl.load(dy_cols + rows[:, None] * stride_dyt, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, dy, acc, input_precision=PRECISION)
        if splits == 1:
            dw = dw_ptr + n.to(tl.int64)[None, :] * stride_dw + cols[:, None]
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=exists[:, None])
        else:
            i = tl.arange(0, BLOCK)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
            tl.store(partial_ptr + work * (ROWS * BLOCK) + i, acc)


@triton.jit(do_not_specialize=["tokens", "block_rows"])
def _sum_parts_kernel(
    dw_ptr,
    partial_ptr,
    row_ptr,
    col_idx,
    tokens,
    block_rows,
    stride_dw,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
):
    """Second stage of a split weight gradient: each unit's partial sums, added in order. Else nothing."""
    JOIN: tl.constexpr = ROWS // BLOCK
    PIECE: tl.constexpr = 2048
    PIECES: tl.constexpr = ROWS * BLOCK // PIECE
    programs = tl.num_programs(0)
    _, _, units = _units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    splits = _splits(units, tl.cdiv(tokens, DEPTH), programs, MIN_STEPS, MAX_SPLITS, WAVES)
    if splits > 1:
        for work in range(tl.program_id(0), units * PIECES, programs):
            unit = work // PIECES
            row, first, stop = _unit_blocks(row_ptr, block_rows, unit, JOIN, CHUNK)
            i = work % PIECES * PIECE + tl.arange(0, PIECE)
            acc = tl.zeros((PIECE,), tl.float32)
            for part in range(splits):
                acc += tl.load(partial_ptr + (part * units + unit) * (ROWS * BLOCK) + i)
            cols, exists = _unit_columns(col_idx, first, stop, i % ROWS, BLOCK)
            n = row * BLOCK + i // ROWS
            dw = dw_ptr + n.to(tl.int64) * stride_dw + cols
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=exists)


def grad_weight(dy2d: Tensor, x2d: Tensor, topology: BlockTopology, tiles: Tiles, *, precision: str) -> Tensor:
    """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> (out, in)``, ``T >= 1``, 0 in inactive blocks.

    Args:
        dy2d: ``[T, out]``, any strides.
        x2d: ``[T, in]``, any strides.
        topology: which blocks of the weight are active.
        tiles: how to cut the work.
        precision: of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    tokens = x2d.shape[0]
    dw = x2d.new_zeros(topology.shape)
    capacity = topology.block_rows * triton.cdiv(topology.block_cols * topology.block_size, tiles.rows)
    may_split = triton.cdiv(tokens, tiles.depth) >= 2 * MIN_STEPS
    programs = multiprocessors(x2d.device) * tiles.resident(topology.block_size)
    parts = min(WAVES * programs, MAX_SPLITS * capacity) if may_split else 0
    if not may_split:
        programs = min(programs, capacity)
    partial = x2d.new_empty(parts, topology.block_size, tiles.rows, dtype=torch.float32)
    cut = {
        "BLOCK": topology.block_size,
        "DEPTH": tiles.depth,
        "CHUNK": min(CHUNK, triton.next_power_of_2(topology.block_rows)),
        "MIN_STEPS": MIN_STEPS,
        "MAX_SPLITS": MAX_SPLITS,
        "WAVES": WAVES,
    }
    sizes = (tokens, topology.block_rows)
    with _on(x2d.device):
        _grad_weight_kernel[(programs,)](
            dw,
            partial,
            dy2d,
            x2d,
            topology.row_ptr,
            topology.col_idx,
            *sizes,
            dw.stride(0),
            *dy2d.stride(),
            *x2d.stride(),
            **cut,
            **_options(tiles, x2d.dtype, precision),
        )
        if may_split:
            _sum_parts_kernel[(programs,)](
                dw,
                partial,
                topology.row_ptr,
                topology.col_idx,
                *sizes,
                dw.stride(0),
                ROWS=tiles.rows,
                enable_fp_fusion=True,
                **cut,
            )
    return dw


# ---- launching


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; few where the interpreter stands in for one."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, whatever device its arguments are on.
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _options(tiles: Tiles, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    return {
        "ROWS": tiles.rows,
        "PRECISION": precision if dtype == torch.float32 else "ieee",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # Triton's own default; unnamed, 3.9 warns that it will change
    }
