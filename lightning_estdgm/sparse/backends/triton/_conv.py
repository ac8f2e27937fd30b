# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the block-sparse 2-D convolution as an implicit matrix product, and its launches for Y and dX.

Rows of the products are pixels, read where they lie in channels-last memory: no patches are copied. As in the linear
layer, sums are in float32 and in a fixed order, and of the topology only device memory is read, so launches can be
captured in a CUDA graph. Importing this module imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton._pixels import SIZES, below, by_channels, channels_last, check_pixels
from lightning_estdgm.sparse.backends.triton._requirements import MAX_TAPS
from lightning_estdgm.sparse.backends.triton._tiles import Tiles

# ---- Y = conv(X, W * M) + bias


@triton.jit(do_not_specialize=[*SIZES, "block_rows"])
def _conv_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    row_ptr,
    col_idx,
    images,
    in_h,
    in_w,
    out_h,
    out_w,
    step_h,
    step_w,
    first_h,
    first_w,
    hop_h,
    hop_w,
    block_rows,
    channels,
    stride_yi,
    stride_yh,
    stride_yw,
    stride_wn,
    stride_wk,
    stride_wr,
    stride_ws,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    MAX_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS output pixels of one block row of output channels.

    Output pixel (h, w) meets, at tap (r, s), input pixel (h * step_h + first_h + r * hop_h, likewise for w). The sum
    goes over active blocks, and over all taps of each.
    """
    TAPS: tl.constexpr = KH * KW
    tl.static_assert(KH <= MAX_TAPS)
    tl.static_assert(KW <= MAX_TAPS)
    pixels = images * out_h * out_w
    pid = tl.program_id(0)
    sweep = SWIZZLE * block_rows
    first_tile = pid // sweep * SWIZZLE
    tiles = tl.minimum(tl.cdiv(pixels, ROWS) - first_tile, SWIZZLE)
    tile = first_tile + pid % sweep % tiles
    row = pid % sweep // tiles

    p = tile * ROWS + tl.arange(0, ROWS)
    image = p // (out_h * out_w)
    out_y = p // out_w % out_h
    out_x = p % out_w
    w = out_x * step_w + first_w
    h = out_y * step_h + first_h
    n = row * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    x_rows = x_ptr + ((image.to(tl.int64) * in_h + h) * in_w + w)[:, None] * channels
    # Which taps meet the image, a bit for each row and each column of the kernel.
    hits = tl.zeros((ROWS,), tl.int32)
    for i in tl.static_range(KH):
        hits |= below(h + i * hop_h, in_h).to(tl.int32) << i
    for j in tl.static_range(KW):
        hits |= below(w + j * hop_w, in_w).to(tl.int32) << (j + MAX_TAPS)
    hits = tl.where(p < pixels, hits, 0)
    w_rows = w_ptr + n.to(tl.int64)[None, :] * stride_wn
    begin = tl.load(row_ptr + row)
    end = tl.load(row_ptr + row + 1)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    if DEPTH <= BLOCK:
        PARTS: tl.constexpr = BLOCK // DEPTH
        col = tl.load(col_idx + begin, mask=begin < end, other=0)
        for step in range(begin * (PARTS * TAPS), end * (PARTS * TAPS)):
            r = step % TAPS // KW
            s = step % KW
            needed = (1 << r) | (1 << (s + MAX_TAPS))
            inside = (hits & needed) == needed
            cols = (col * BLOCK + step // TAPS % PARTS * DEPTH + k).to(tl.int64)
            x_shift = (r * hop_h * in_w + s * hop_w).to(tl.int64) * channels
            w_shift = (r * stride_wr + s * stride_ws).to(tl.int64)
            x_tile = tl.load(x_rows + (x_shift + cols)[None, :], mask=inside[:, None], other=0.0)
            w_tile = tl.load(w_rows + (w_shift + cols * stride_wk)[:, None])
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            slot = (step + 1) // (PARTS * TAPS)
            col = tl.load(col_idx + slot, mask=slot < end, other=0)
    else:  # several blocks in one step; those past the end of the block row count as zeros
        JOIN: tl.constexpr = DEPTH // BLOCK
        for step in range(tl.cdiv(end - begin, JOIN) * TAPS):
            r = step % TAPS // KW
            s = step % KW
            needed = (1 << r) | (1 << (s + MAX_TAPS))
            inside = (hits & needed) == needed
            slot = begin + step // TAPS * JOIN + k // BLOCK
            exists = slot < end
            cols = tl.load(col_idx + slot, mask=exists, other=0) * BLOCK + k % BLOCK
            cols = tl.max_contiguous(tl.multiple_of(cols, BLOCK), BLOCK).to(tl.int64)
            x_shift = (r * hop_h * in_w + s * hop_w).to(tl.int64) * channels
            w_shift = (r * stride_wr + s * stride_ws).to(tl.int64)
            both = inside[:, None] & exists[None, :]
            x_tile = tl.load(x_rows + (x_shift + cols)[None, :], mask=both, other=0.0)
            w_tile = tl.load(w_rows + (w_shift + cols * stride_wk)[:, None], mask=exists[:, None], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    y_rows = image.to(tl.int64) * stride_yi + out_y.to(tl.int64) * stride_yh + out_x.to(tl.int64) * stride_yw
    tl.store(y_ptr + y_rows[:, None] + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=p[:, None] < pixels)


def _correlate(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    walk: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    tiles: Tiles,
    precision: str,
) -> None:
    """Write ``y [N, H', W', out]`` (channels side by side) from ``x [N, H, W, in]`` (contiguous).

    ``walk``: step, first, hop, each (height, width), as in the kernel.
    """
    pixels = y.shape[:3].numel()
    check_pixels(pixels, x.shape[:3].numel())
    grid = (triton.cdiv(pixels, tiles.rows) * topology.block_rows,)
    (step, first, hop) = walk
    with launch.on(x.device):
        _conv_kernel[grid](
            y,
            x,
            weight,
            None if bias is None else bias.contiguous(),
            topology.row_ptr,
            topology.col_idx,
            *x.shape[:3],
            *y.shape[1:3],
            *step,
            *first,
            *hop,
            topology.block_rows,
            x.shape[3],
            *y.stride()[:3],
            *weight.stride(),
            KH=weight.shape[2],
            KW=weight.shape[3],
            BLOCK=topology.side,
            ROWS=tiles.rows,
            DEPTH=tiles.depth,
            SWIZZLE=launch.SWIZZLE,
            MAX_TAPS=MAX_TAPS,
            HAS_BIAS=bias is not None,
            **launch.options(tiles, x.dtype, precision),
        )


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    geometry: ConvGeometry,
    tiles: Tiles,
    *,
    precision: str,
) -> Tensor:
    """``Y = conv2d(X, W * M) + bias``: ``[N, in, H, W] -> [N, out, H', W']``, ``N >= 1``, in channels-last memory.

    Args:
        x: ``[N, in, H, W]``, copied unless in channels-last memory.
        weight: ``(out, in, kh, kw)``, copied unless neighbours in memory are neighbours of output or input channels.
        bias: ``[out]`` or None.
        topology: Active blocks of the weight.
        geometry: Kernel, stride, padding and dilation.
        tiles: Cut of the work; its rows are pixels.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    x = channels_last(x)
    y = x.new_empty(x.shape[0], *geometry.output_size(*x.shape[1:3]), topology.shape[0])
    padding = (-geometry.padding[0], -geometry.padding[1])
    walk = (geometry.stride, padding, geometry.dilation)
    _correlate(y, x, by_channels(weight), bias, topology, walk, tiles, precision)
    return y.permute(0, 3, 1, 2)


# ---- dX


@dataclass(frozen=True)
class InputPhase:
    """Every stride-th row (or column) of a convolution's input, and the taps that meet them.

    Row ``start + stride * i`` of the input meets tap ``j`` of ``taps`` at row ``i + first + hop * j`` of the output.

    Attributes:
        start: First row of the input.
        taps: Taps that meet these rows.
        first: Row of the output at the first tap, for the first row.
        hop: Rows of the output from one tap to the next.
    """

    start: int
    taps: slice
    first: int
    hop: int


def phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Iterator[InputPhase]:
    """Rows (or columns) of an input by their remainder modulo the stride; those that no tap meets are left out."""
    common = math.gcd(stride, dilation)
    for start in range(min(stride, size)):
        for tap in range(min(kernel, stride // common)):
            ahead = start + padding - tap * dilation
            if ahead % stride == 0:
                yield InputPhase(start, slice(tap, None, stride // common), ahead // stride, -dilation // common)


def conv_grad_input(
    dy: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    topology: BlockTopology,
    geometry: ConvGeometry,
    tiles: Tiles,
    *,
    precision: str,
) -> Tensor:
    """Gradient of the input, ``[N, out, H', W'] -> [N, in, *size]``, ``N >= 1``, in channels-last memory.

    Input pixels that are a multiple of the stride apart meet the same taps, so each such set is a convolution of stride
    1 of its own, with those taps alone: one launch each.

    Args:
        dy: ``[N, out, H', W']``, copied unless in channels-last memory.
        weight: ``(out, in, kh, kw)``, copied unless neighbours in memory are neighbours of output or input channels.
        size: ``(H, W)``.
        topology: Active blocks of the weight.
        geometry: Kernel, stride, padding and dilation.
        tiles: Cut of the work; its rows are pixels.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    dy = channels_last(dy)
    weight = by_channels(weight).transpose(0, 1)
    rows, cols = (
        tuple(phases(*sizes))
        for sizes in zip(size, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    )
    covered = (len(rows), len(cols)) == tuple(map(min, size, geometry.stride))
    dx = (dy.new_empty if covered else dy.new_zeros)(dy.shape[0], *size, topology.shape[1])
    for row in rows:
        for col in cols:
            part = dx[:, row.start :: geometry.stride[0], col.start :: geometry.stride[1]]
            taps = weight[:, :, row.taps, col.taps]
            walk = ((1, 1), (row.first, col.first), (row.hop, col.hop))
            _correlate(part, dy, taps, None, topology.transpose(), walk, tiles, precision)
    return dx.permute(0, 3, 1, 2)
