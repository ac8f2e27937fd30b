# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the weight gradient of the block-sparse 2-D convolution, and its launch. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton._pixels import SIZES, below, channels_last, check_pixels
from lightning_estdgm.sparse.backends.triton._split_k import deal, split_count, unit_blocks, unit_columns, units_before
from lightning_estdgm.sparse.backends.triton._tiles import Tiles


@triton.jit(do_not_specialize=[*SIZES, "block_rows"])
def _conv_grad_weight_kernel(
    dw_ptr,
    partial_ptr,
    dy_ptr,
    x_ptr,
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
    features,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: every so-many-th item (see split_k.py), one tap of a unit, for a range of output pixels.

    Where items are few, the pixels are split and partial sums go to ``partial_ptr [splits * items, BLOCK, ROWS]``. The
    tile is the gradient's transpose: its long side is the one that matrix units want long. Gradient: ``[features, KH,
    KW, channels]``.
    """
    JOIN: tl.constexpr = ROWS // INNER
    TAPS: tl.constexpr = KH * KW
    pixels = images * out_h * out_w
    programs = tl.num_programs(0)
    _, _, units = units_before(row_ptr, block_rows, 0, JOIN, CHUNK)
    items = units * TAPS
    steps = tl.cdiv(pixels, DEPTH)
    splits = split_count(items, steps, programs, MIN_STEPS, MAX_SPLITS, WAVES)
    span = tl.cdiv(steps, splits) * DEPTH
    span_h = out_h * step_h
    span_w = out_w * step_w
    on_image = DEPTH // (out_w * out_h)
    on_h = DEPTH // out_w % out_h * step_h
    on_w = DEPTH % out_w * step_w
    on_pixel = (on_image * in_h + on_h) * in_w + on_w
    for work in range(tl.program_id(0), items * splits, programs):
        # Programs that run at a time read the same pixels.
        part = work // items
        item = work % items
        tap = item % TAPS
        row, first, stop = unit_blocks(row_ptr, block_rows, item // TAPS, JOIN, CHUNK)
        cols, exists = unit_columns(col_idx, first, stop, tl.arange(0, ROWS), INNER)
        n = row * BLOCK + tl.arange(0, BLOCK)
        x_cols = x_ptr + cols.to(tl.int64)[:, None]
        dy_cols = dy_ptr + n.to(tl.int64)[None, :]
        at_h = first_h + tap // KW * hop_h
        at_w = first_w + tap % KW * hop_w
        end = tl.minimum((part + 1) * span, pixels)
        # The input pixels of DEPTH output pixels, then of the next DEPTH: carried over like digits, without a division.
        p = part * span + tl.arange(0, DEPTH)
        image = p // (out_h * out_w)
        h = p // out_w % out_h * step_h + at_h
        w = p % out_w * step_w + at_w
        pixel = (image * in_h + h) * in_w + w
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(part * span, end, DEPTH):
            p = start + tl.arange(0, DEPTH)
            inside = (p < end) & below(h, in_h) & below(w, in_w)
            x = tl.load(x_cols + pixel.to(tl.int64)[None, :] * channels, mask=inside[None, :], other=0.0)
            dy = tl.load(dy_cols + p.to(tl.int64)[:, None] * features, mask=(p < end)[:, None], other=0.0)
            acc = tl.dot(x, dy, acc, input_precision=PRECISION)
            w += on_w
            pixel += on_pixel
            over = w >= at_w + span_w
            w = tl.where(over, w - span_w, w)
            h += tl.where(over, on_h + step_h, on_h)
            pixel += tl.where(over, step_h * in_w - span_w, 0)
            over = h >= at_h + span_h
            h = tl.where(over, h - span_h, h)
            pixel += tl.where(over, (in_h - span_h) * in_w, 0)
        if splits == 1:
            dw = dw_ptr + (n.to(tl.int64)[None, :] * TAPS + tap) * channels + cols[:, None]
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=exists[:, None])
        else:
            i = tl.arange(0, BLOCK)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
            tl.store(partial_ptr + work * (ROWS * BLOCK) + i, acc)


def conv_grad_weight(
    dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry, tiles: Tiles, *, precision: str
) -> Tensor:
    """Gradient of the weight, ``(out, in, kh, kw)`` in channels-last memory, 0 in inactive blocks; ``N >= 1``.

    Args:
        dy: ``[N, out, H', W']``, copied unless in channels-last memory.
        x: ``[N, in, H, W]``, copied unless in channels-last memory.
        topology: Active blocks of the weight.
        geometry: Kernel, stride, padding and dilation.
        tiles: Cut of the work; its rows are input channels.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    dy, x = channels_last(dy), channels_last(x)
    pixels = dy.shape[:3].numel()
    check_pixels(pixels, x.shape[:3].numel())
    kh, kw = geometry.kernel_size
    dw = x.new_zeros(topology.shape[0], kh, kw, topology.shape[1])
    dealt = deal(pixels, topology, tiles, x.device, kh * kw)
    with launch.on(x.device):
        _conv_grad_weight_kernel[(dealt.programs,)](
            dw,
            dealt.partial,
            dy,
            x,
            topology.row_ptr,
            topology.col_idx,
            *x.shape[:3],
            *dy.shape[1:3],
            *geometry.stride,
            -geometry.padding[0],
            -geometry.padding[1],
            *geometry.dilation,
            topology.block_rows,
            x.shape[3],
            dy.shape[3],
            KH=kh,
            KW=kw,
            **dealt.cut,
            **launch.options(tiles, x.dtype, precision),
        )
        dealt.add_parts(dw, dw.stride()[2:], pixels, topology)
    return dw.permute(0, 3, 1, 2)
