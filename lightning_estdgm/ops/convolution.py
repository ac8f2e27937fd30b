"""Convolutions on the active blocks of their weight: the geometry, what a backend offers, and the operator.

A block is ``b x b`` over output and input channels, all taps of the kernel together: the topology's matrix is
``(out_channels, in_channels)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_estdgm.ops import Backend
from lightning_estdgm.topology import BlockTopology

__all__ = ["ConvBackend", "ConvGeometry"]


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-D convolution (one group, zeros around the image) walks over its input; each pair is (height, width).

    Attributes:
        kernel_size: taps, at least 1.
        stride: at least 1.
        padding: rows and columns of zeros on each side, at least 0.
        dilation: distance between taps, at least 1.

    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        out_h, out_w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return out_h, out_w


@runtime_checkable
class ConvBackend(Backend, Protocol):
    """A backend that has the three products of a convolution as well.

    Called below autograd, with checked arguments: ``x [N, in, H, W]`` and ``dy [N, out, H', W']`` in channels-last
    memory, ``weight (out, in, kh, kw)`` of any strides, all of one dtype and device, ``N >= 0``. They return new
    tensors; activations in channels-last memory. What inactive blocks of ``weight`` hold must not reach a result.
    """

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a case cannot be run, or None. May read sizes of the topology, never its tensors."""
        ...

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y = conv2d(X, W * M) + bias``, shape ``[N, out, H', W']``."""
        ...

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input, shape ``[N, in, *size]``."""
        ...

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight, shape ``(out, in, kh, kw)``, exactly 0 in inactive blocks."""
        ...
