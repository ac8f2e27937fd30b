"""2-D convolutions as backends see them: their geometry, channels-last images, and gradients by the library.

A unit is ``h x w`` over output and input channels, all taps of the kernel together: the topology's matrix is
``(out_channels, in_channels)``. Or it is a single weight, a tap: the matrix is ``(out_channels, in_channels * taps)``,
as the weight is flattened, all taps of one input before those of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding and dilation of a 2-D convolution of one group, zeros around the image.

    Each pair is (height, width).

    Attributes:
        kernel_size: Number of taps, at least 1.
        stride: Input pixels from one output pixel to the next, at least 1.
        padding: Rows and columns of zeros on each side, at least 0.
        dilation: Distance between taps, at least 1.

    Raises:
        ValueError: A field is no pair, or a number is below its minimum.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2 or min(pair) < least:
                raise ValueError(f"{name} must be two numbers of at least {least}, got {pair}")

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer on pixels: one tap and no padding, of any stride."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        out_h, out_w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return out_h, out_w


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return torch's name of channels-last or of contiguous memory."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(like: Tensor, *shape: int, channels_last: bool = True) -> Tensor:
    """Return an uninitialised ``[N, channels, H, W]`` tensor of the dtype and on the device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def library_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a dense convolution for ``x``, ``weight`` and bias, by the library; only those that are wanted."""
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), 1, wanted
    )
