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
    width,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS tokens of one block row of the output. Blocks are BLOCK outputs x INNER inputs."""
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
    if DEPTH <= INNER:
        PARTS: tl.constexpr = INNER // DEPTH
        col = tl.load(col_idx + begin, mask=begin < end, other=0)
        for step in range(begin * PARTS, end * PARTS):
            cols = (col * INNER + step % PARTS * DEPTH + k).to(tl.int64)
            x = tl.load(x_rows + cols[None, :] * stride_xk)
            w = tl.load(w_rows + cols[:, None] * stride_wk)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            slot = (step + 1) // PARTS
            col = tl.load(col_idx + slot, mask=slot < end, other=0)
    else:  # several blocks in one step; those past the end of the block row count as zeros
        JOIN: tl.constexpr = DEPTH // INNER
        for first in range(begin, end, JOIN):
            slot = first + k // INNER
            exists = slot < end
            cols = tl.load(col_idx + slot, mask=exists, other=0) * INNER + k % INNER
            cols = tl.max_contiguous(tl.multiple_of(cols, INNER), INNER).to(tl.int64)
            x = tl.load(x_rows + cols[None, :] * stride_xk, mask=exists[None, :], other=0.0)
            w = tl.load(w_rows + cols[:, None] * stride_wk, mask=exists[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    inside = t[:, None] < tokens
    if HAS_EDGE:  # the last block row has fewer outputs
        inside &= n[None, :] < width
    if HAS_BIAS:
        if HAS_EDGE:
            acc += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        else:
            acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    y = y_ptr + t.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)


def linear(
    x2d: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    tiles: Tiles,
    *,
    precision: str,
    width: int | None = None,
) -> Tensor:
    """``Y = X (W * M)^T + bias``: ``[T, in] -> [T, out]``, ``T >= 1``.

    Args:
        x2d: ``[T, in]``, any strides.
        weight: ``(out, in)``, any strides.
        bias: ``[out]`` or None.
        topology: Active blocks of the weight, of any sides that are powers of two.
        tiles: Cut of the work.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
        width: Outputs that exist, where the last block row of the weight only fills up.
    """
    tokens = x2d.shape[0]
    out, block = topology.shape[0], topology.sides[0]
    width = out if width is None else width
    y = x2d.new_empty(tokens, width)
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
            width,
            BLOCK=block,
            INNER=topology.sides[1],
            ROWS=tiles.rows,
            DEPTH=tiles.depth,
            SWIZZLE=launch.SWIZZLE,
            HAS_BIAS=bias is not None,
            HAS_EDGE=width < out,
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
    stride_dwn,
    stride_dwk,
    stride_dyt,
    stride_dyn,
    stride_xt,
    stride_xk,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    FILLED_UP: tl.constexpr,
    CHUNK: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: every so-many-th unit, ROWS columns by one block row of the gradient, for a range of tokens.

    Where units (see split_k.py) are few, the tokens are split and partial sums go to ``partial_ptr [splits * units,
    BLOCK, ROWS]``. The tile is the gradient's transpose: its long side is the one that matrix units want long.
    Blocks are BLOCK outputs x INNER inputs; columns of the tile past BLOCK, up to WIDE, are zeros and never written.
    FILLED_UP: ``x`` has rows of zeros up to a whole last step, to be read without a mask.
    """
    JOIN: tl.constexpr = ROWS // INNER
    programs = tl.num_programs(0)
    _, _, units = units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    steps = tl.cdiv(tokens, DEPTH)
    splits = split_count(units, steps, programs, MIN_STEPS, MAX_SPLITS, WAVES)
    span = tl.cdiv(steps, splits) * DEPTH
    for work in range(tl.program_id(0), units * splits, programs):
        # Programs that run at a time read the same tokens.
        part = work // units
        row, first, stop = unit_blocks(row_ptr, block_rows, work % units, JOIN, CHUNK)
        cols, exists = unit_columns(col_idx, first, stop, tl.arange(0, ROWS), INNER)
        j = tl.arange(0, WIDE)
        n = row * BLOCK + j
        x_cols = x_ptr + cols.to(tl.int64)[:, None] * stride_xk
        dy_cols = dy_ptr + n.to(tl.int64)[None, :] * stride_dyn
        end = tl.minimum((part + 1) * span, tokens)
        acc = tl.zeros((ROWS, WIDE), tl.float32)
        for start in range(part * span, end, DEPTH):
            t = start + tl.arange(0, DEPTH)
            inside = t < end
            rows = t.to(tl.int64)
            if FILLED_UP:
                x = tl.load(x_cols + rows[None, :] * stride_xt)
            else:
                x = tl.load(x_cols + rows[None, :] * stride_xt, mask=inside[None, :], other=0.0)
            dy_inside = inside[:, None] & (j < BLOCK)[None, :] if WIDE > BLOCK else inside[:, None]
            dy = tl.load(dy_cols + rows[:, None] * stride_dyt, mask=dy_inside, other=0.0)
            acc = tl.dot(x, dy, acc, input_precision=PRECISION)
        written = exists[:, None] & (j < BLOCK)[None, :] if WIDE > BLOCK else exists[:, None]
        if splits == 1:
            dw = dw_ptr + n.to(tl.int64)[None, :] * stride_dwn + cols.to(tl.int64)[:, None] * stride_dwk
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=written)
        else:
            i = j[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
            if WIDE > BLOCK:
                tl.store(partial_ptr + work * (ROWS * BLOCK) + i, acc, mask=(j < BLOCK)[None, :])
            else:
                tl.store(partial_ptr + work * (ROWS * BLOCK) + i, acc)


def grad_weight(
    dy2d: Tensor,
    x2d: Tensor,
    topology: BlockTopology,
    tiles: Tiles,
    *,
    precision: str,
    dw: Tensor | None = None,
    filled_up: bool = False,
) -> Tensor:
    """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> (out, in)``, ``T >= 1``, 0 in inactive blocks.

    Args:
        dy2d: ``[T, out]``, any strides.
        x2d: ``[T, in]``, any strides; more rows where they are filled up.
        topology: Active blocks of the weight.
        tiles: Cut of the work.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
        dw: Zeros, of any strides, that take the gradient; by default new ones.
        filled_up: Whether ``x2d`` has rows of zeros up to a multiple of the cut's depth.
    """
    tokens = dy2d.shape[0]
    dw = x2d.new_zeros(topology.shape) if dw is None else dw
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
            *dw.stride(),
            *dy2d.stride(),
            *x2d.stride(),
            WIDE=max(topology.sides[0], tiles.columns),
            FILLED_UP=filled_up,
            **dealt.cut,
            **launch.options(tiles, x2d.dtype, precision),
        )
        dealt.add_parts(dw, dw.stride(), tokens, topology)
    return dw
