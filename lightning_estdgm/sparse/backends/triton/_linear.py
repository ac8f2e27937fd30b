# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the block-sparse linear layer, and their launches. Importing this module imports Triton.

Both products reduce in float32 and in a fixed order, without atomics. Dense operands are read in place through their
strides; of the topology only device memory is read, so a launch never waits for the device and can be captured in a
CUDA graph that then follows masks updated in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton._split_k import deal, split_count, unit_blocks, unit_columns, units_before
from lightning_estdgm.sparse.backends.triton._tiles import Tiles

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
        topology: Active blocks of the weight.
        tiles: Cut of the work.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    tokens = x2d.shape[0]
    y = x2d.new_empty(tokens, topology.shape[0])
    if bias is not None:
        bias = bias.contiguous()
    grid = (triton.cdiv(tokens, tiles.rows) * topology.block_rows,)
    with launch.on(x2d.device):
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
            BLOCK=topology.side,
            ROWS=tiles.rows,
            DEPTH=tiles.depth,
            SWIZZLE=launch.SWIZZLE,
            HAS_BIAS=bias is not None,
            **launch.options(tiles, x2d.dtype, precision),
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

    Where units (see split_k.py) are few, the tokens are split and partial sums go to ``partial_ptr [splits * units,
    BLOCK, ROWS]``. The tile is the gradient's transpose: its long side is the one that matrix units want long.
    """
    JOIN: tl.constexpr = ROWS // BLOCK
    programs = tl.num_programs(0)
    _, _, units = units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    steps = tl.cdiv(tokens, DEPTH)
    splits = split_count(units, steps, programs, MIN_STEPS, MAX_SPLITS, WAVES)
    span = tl.cdiv(steps, splits) * DEPTH
    for work in range(tl.program_id(0), units * splits, programs):
        # Programs that run at a time read the same tokens.
        part = work // units
        row, first, stop = unit_blocks(row_ptr, block_rows, work % units, JOIN, CHUNK)
        cols, exists = unit_columns(col_idx, first, stop, tl.arange(0, ROWS), BLOCK)
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


def grad_weight(dy2d: Tensor, x2d: Tensor, topology: BlockTopology, tiles: Tiles, *, precision: str) -> Tensor:
    """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> (out, in)``, ``T >= 1``, 0 in inactive blocks.

    Args:
        dy2d: ``[T, out]``, any strides.
        x2d: ``[T, in]``, any strides.
        topology: Active blocks of the weight.
        tiles: Cut of the work.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    tokens = x2d.shape[0]
    dw = x2d.new_zeros(topology.shape)
    dealt = deal(tokens, topology, tiles, x2d.device)
    with launch.on(x2d.device):
        _grad_weight_kernel[(dealt.programs,)](
            dw,
            dealt.partial,
            dy2d,
            x2d,
            topology.row_ptr,
            topology.col_idx,
            tokens,
            topology.block_rows,
            topology.shape[1],
            *dy2d.stride(),
            *x2d.stride(),
            **dealt.cut,
            **launch.options(tiles, x2d.dtype, precision),
        )
        dealt.add_parts(dw, tokens, topology)
    return dw
