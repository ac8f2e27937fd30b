"""Grid that ``estdgm bench kernels`` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_estdgm._checks import expect_int
from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.modules._mask_unit import UNIT_SIZES, check_unit_size
from lightning_estdgm.tools.bench._environment import default_device

KINDS = ("linear", "convolution")
"""Linear layers of given shapes, and the convolutions of a ResNet-50."""

_CPU_SHAPES = ((1024, 1536, 512), (1024, 2048, 512), (2048, 1024, 1024))
_GPU_SHAPES = ((8192, 4096, 4096), (8192, 2048, 2048), (8192, 8192, 2048), (8192, 2048, 8192))


@dataclass(frozen=True)
class KernelsConfig:
    """Grid to measure; settings that are left out take the device's defaults.

    Attributes:
        shapes: (tokens, out_features, in_features) of linear layers.
        block_sizes: sides of a block, or pairs of them.
        densities: active shares, in (0, 1].
        dtypes: names of torch's floating-point dtypes.
        kinds: names of `KINDS`.
        images: batch of the convolutions.
        image_size: height and width of the images that the ResNet-50 sees, in pixels.
        most_layers: largest number of its convolutions, those with the most work; 0 for all.
        device: device to measure on; the GPU if there is one.
        rounds: timed turns of each; the fastest counts.
        peers: whether to measure PyTorch's own sparse layouts too.

    Raises:
        ValueError: for anything outside these.
    """

    shapes: Sequence[tuple[int, int, int]] = ()
    block_sizes: Sequence[BlockSize] = UNIT_SIZES
    densities: Sequence[float] = (0.125, 0.25, 0.5)
    dtypes: Sequence[str] = ()
    kinds: Sequence[str] = KINDS
    images: int = 0
    image_size: int = 224
    most_layers: int = 0
    device: str = field(default_factory=default_device)
    rounds: int = 5
    peers: bool = True

    def __post_init__(self) -> None:
        on_gpu = self.device != "cpu"
        defaults = {
            "shapes": _GPU_SHAPES if on_gpu else _CPU_SHAPES,
            "dtypes": ("bfloat16", "float16") if on_gpu else ("float32", "bfloat16"),
            "images": 64 if on_gpu else 2,
        }
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)
        for name in ("block_sizes", "densities", "kinds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got nothing, expected at least one")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        for dtype in self.dtypes:
            if not isinstance(found := getattr(torch, dtype, None), torch.dtype) or not found.is_floating_point:
                raise ValueError(f"dtype: got {dtype!r}, expected a floating-point one such as float32 or bfloat16")
        for density in self.densities:
            if not 0.0 < density <= 1.0:
                raise ValueError(f"density: got {density}, expected a share in (0, 1]")
        for name, value in (("images", self.images), ("image_size", self.image_size), ("rounds", self.rounds)):
            expect_int(name, value, at_least=1)
        for shape in self.shapes:
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"shape: got {shape}, expected tokens, out_features and in_features")
            for block_size in self.block_sizes:
                check_unit_size("block size", block_size)
                rows, columns = sides(block_size)
                if shape[1] % rows or shape[2] % columns:
                    raise ValueError(f"shape {shape}: got block size {block_size}, expected a divisor of its features")


def quick_kernels(device: str | None = None) -> KernelsConfig:
    """Return the few cases that show most, within minutes: one or two shapes, two or three blocks, one dtype."""
    device = device or default_device()
    if device == "cpu":
        return KernelsConfig(
            shapes=((2048, 1024, 1024),),
            block_sizes=(1, (4, 1), 4, 64),
            densities=(0.1, 0.25),
            dtypes=("float32",),
            images=1,
            most_layers=4,
            device=device,
            rounds=3,
        )
    return KernelsConfig(
        shapes=((8192, 4096, 4096), (8192, 2048, 2048)),
        block_sizes=(32, 64, 128),
        densities=(0.125, 0.25),
        dtypes=("bfloat16",),
        most_layers=8,
        device=device,
        rounds=3,
    )
