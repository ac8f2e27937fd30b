"""Convolutions by the compiled operator, as implicit matrix products.

One tap of one block or finer unit after the other is multiplied from a window of the image. The units of a topology are
those of all taps of the kernel, or, where its columns are the taps of each input, of single taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_estdgm.sparse._conv_geometry import ConvGeometry, empty_image
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native._build import check, function
from lightning_estdgm.sparse.backends.native._conv_units import correlate_units, units_grad_weight
from lightning_estdgm.sparse.backends.native._kept import KeptWeight, KeptWeights
from lightning_estdgm.sparse.backends.native._plans import Plans, Tap, tap_array

BLOCK = 16
"""Side of the smallest blocks that have outputs as the vector: the widest vector register."""


def _taps(geometry: ConvGeometry, row_stride: int, col_stride: int) -> list[Tap]:
    """Return the taps of an output pixel, with weights that many elements apart."""
    (rows, cols), (ph, pw), (dh, dw) = geometry.kernel_size, geometry.padding, geometry.dilation
    return [
        (dh * k - ph, dw * m - pw, k * row_stride + m * col_stride)
        for k, m in itertools.product(range(rows), range(cols))
    ]


def _reached(phase: int, size: int, stride: int, padding: int, dilation: int) -> list[tuple[int, int]]:
    """Taps that connect input positions ``phase + stride * u`` with output positions ``u + offset``: tap, offset."""
    spans = ((tap, divmod(phase + padding - dilation * tap, stride)) for tap in range(size))
    return [(tap, offset) for tap, (offset, rest) in spans if rest == 0]


def _depth(topology: BlockTopology, features: int) -> int:
    """Return the columns that a topology has for each input channel: 1, or one for each tap."""
    return topology.shape[1] // features


def is_fine(topology: BlockTopology) -> bool:
    """Whether units are finer than the blocks that have output channels as the vector."""
    return min(topology.sides) < BLOCK


def _correlate(
    image: Tensor,
    weight: Tensor,
    taps: Sequence[Tap],
    step: tuple[int, int],
    bias: Tensor | None,
    topology: BlockTopology,
    out: Tensor,
    kept: KeptWeight | None = None,
) -> None:
    """Fill ``out [N, out, H', W']``, channels adjacent, with what the taps see of ``image``; weight strides count."""
    n, channels, height, width = image.shape
    check(
        function("conv", image.dtype)(
            image.data_ptr(),
            n,
            height,
            width,
            channels,
            weight.data_ptr(),
            *weight.stride()[:2],
            tap_array(taps),
            len(taps),
            *step,
            None if bias is None else bias.data_ptr(),
            topology.row_ptr.data_ptr(),
            topology.col_idx.data_ptr(),
            topology.block_rows,
            topology.side,
            out.data_ptr(),
            *out.shape[2:],
            out.stride(0),
            *out.stride()[2:],
            None if kept is None else kept.address,
            torch.get_num_threads(),
        )
    )


def conv(
    plans: Plans,
    kept_weights: KeptWeights,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    geometry: ConvGeometry,
) -> Tensor:
    """``Y = conv2d(X, W * M) + bias``, shape ``[N, out, H', W']``."""
    y = empty_image(x, x.shape[0], topology.shape[0], *geometry.output_size(*x.shape[2:]))
    if y.numel() == 0:
        return y
    taps = _taps(geometry, *weight.stride()[2:])
    bias = None if bias is None else bias.contiguous()
    kept = kept_weights.of(weight, topology, taps)
    if is_fine(topology):
        depth = _depth(topology, x.shape[1])
        correlate_units(plans, x, weight, taps, geometry.stride, bias, topology, depth, (), y, kept)
    else:
        _correlate(x, weight, taps, geometry.stride, bias, topology, y, kept)
    return y


def conv_grad_input(
    plans: Plans,
    dy: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    topology: BlockTopology,
    geometry: ConvGeometry,
) -> Tensor:
    """Gradient of the input: one stride-1 convolution for each position of the input between strides."""
    features = weight.shape[1]
    dx = empty_image(dy, dy.shape[0], features, *size)
    if dx.numel() == 0:
        return dx
    (sh, sw), (row_stride, col_stride) = geometry.stride, weight.stride()[2:]
    rows, cols = (
        [_reached(phase, *sizes) for phase in range(sizes[1])]
        for sizes in zip(geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    )
    depth, swapped = _depth(topology, features), weight.transpose(0, 1)
    for i in range(min(sh, size[0])):
        for j in range(min(sw, size[1])):
            part = dx[:, :, i::sh, j::sw]
            taps = [(u, v, k * row_stride + m * col_stride) for k, u in rows[i] for m, v in cols[j]]
            which: Sequence[int] = (
                [k * geometry.kernel_size[1] + m for k, _ in rows[i] for m, _ in cols[j]] if depth > 1 else ()
            )
            acting = topology if depth > 1 else topology.transpose()
            if not taps:
                part.zero_()
            elif is_fine(topology):
                correlate_units(plans, dy, swapped, taps, (1, 1), None, acting, depth, which, part)
            else:
                _correlate(dy, swapped, taps, (1, 1), None, acting, part)
    return dx


def conv_grad_weight(dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
    """Gradient of the weight, shape ``(out, in, kh, kw)`` in channels-last memory."""
    out, features = topology.shape[0], x.shape[1]
    grad = empty_image(x, out, features, *geometry.kernel_size)
    if dy.numel() == 0:
        return grad.zero_()
    n, _, height, width = x.shape
    taps = _taps(geometry, *grad.stride()[2:])
    if is_fine(topology):
        units_grad_weight(dy, x, taps, geometry.stride, topology, _depth(topology, features), grad)
        return grad
    grad.zero_()
    check(
        function("conv_grad_weight", x.dtype)(
            dy.data_ptr(),
            *dy.shape[2:],
            x.data_ptr(),
            n,
            height,
            width,
            features,
            tap_array(taps),
            len(taps),
            *geometry.stride,
            topology.col_ptr.data_ptr(),
            topology.row_idx.data_ptr(),
            topology.block_rows,
            topology.block_cols,
            topology.side,
            grad.data_ptr(),
            grad.stride(0),
            torch.get_num_threads(),
        )
    )
    return grad
