# mypy: disable-error-code="no-untyped-def"
"""Pixels of the convolution kernels: sizes, a test of bounds, operands in channels-last memory. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ["images", "in_h", "in_w", "out_h", "out_w", "step_h", "step_w", "first_h", "first_w", "hop_h", "hop_w"]
"""Names of the kernels' integer arguments that change with the image: no kernel is compiled anew for them."""


@triton.jit
def below(i, size):
    """``0 <= i < size`` in one comparison."""
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


def channels_last(x: Tensor) -> Tensor:
    """``[N, C, H, W] -> [N, H, W, C]``, contiguous: a view if it lies so already."""
    return x.permute(0, 2, 3, 1).contiguous()


def by_channels(weight: Tensor) -> Tensor:
    """``(out, in, kh, kw)`` with neighbours of output or input channels in memory: a copy unless it lies so already."""
    # Where taps are the neighbours in memory, as in torch's default layout, each value would be a load of its own.
    if 1 in weight.stride()[:2]:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


def check_pixels(*counts: int) -> None:
    """Raise ValueError where pixels are too many for an int32 index."""
    if max(counts) >= 2**31:
        raise ValueError(f"needs fewer than 2**31 pixels in a batch, got {max(counts)}")
