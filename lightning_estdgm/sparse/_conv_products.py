"""Products of a convolution by any backend: pointwise ones as those of a linear layer, the others as its own."""

from __future__ import annotations

from torch import Tensor

from lightning_estdgm.sparse._conv_geometry import ConvGeometry, empty_image
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import Backend, ConvBackend, PointwiseBackend


def conv(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
) -> Tensor:
    """``Y = conv2d(X, W * M) + bias``, shape ``[N, out, H', W']``."""
    if geometry.pointwise:
        seen = _seen(x, geometry)
        if isinstance(backend, PointwiseBackend):
            y = backend.pointwise(_pixels(seen), weight, bias, topology)
        else:
            y = backend.linear(_pixels(seen), weight.flatten(1), bias, topology)
        return _image(y, seen.shape[0], *seen.shape[2:])
    assert isinstance(backend, ConvBackend)
    return backend.conv(x, weight, bias, topology, geometry)


def conv_grad_input(
    backend: Backend,
    dy: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    topology: BlockTopology,
    geometry: ConvGeometry,
) -> Tensor:
    """Gradient of the input, shape ``[N, in, *size]``."""
    if geometry.pointwise:
        dx = _image(backend.grad_input(_pixels(dy), weight.flatten(1), topology), dy.shape[0], *dy.shape[2:])
        if geometry.stride == (1, 1):
            return dx
        spread = empty_image(dy, dy.shape[0], weight.shape[1], *size).zero_()
        _seen(spread, geometry).copy_(dx)
        return spread
    assert isinstance(backend, ConvBackend)
    return backend.conv_grad_input(dy, weight, size, topology, geometry)


def conv_grad_weight(
    backend: Backend, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry
) -> Tensor:
    """Gradient of the weight, shape ``(out, in, kh, kw)``."""
    if geometry.pointwise:
        return backend.grad_weight(_pixels(dy), _pixels(_seen(x, geometry)), topology)[:, :, None, None]
    assert isinstance(backend, ConvBackend)
    return backend.conv_grad_weight(dy, x, topology, geometry)


def _pixels(image: Tensor) -> Tensor:
    """``[N, channels, H, W] -> [N*H*W, channels]``: no copy in channels-last memory."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(pixels: Tensor, batch: int, height: int, width: int) -> Tensor:
    """``[N*H*W, channels] -> [N, channels, H, W]`` in channels-last memory."""
    return pixels.view(batch, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


def _seen(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Part of an image that a pointwise convolution reads."""
    return x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
