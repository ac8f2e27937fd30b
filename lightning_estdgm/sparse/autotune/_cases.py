"""Cases of the never-slower rule: one layer's shape, input and density each, with the operands to time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.method._masks import BlockSize, mask_shape, sides
from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of, count_bucket
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry, memory_format
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import backends, conv_refusal, get_backend

DENSE = "dense"
"""The layer's own dense forward, with the mask applied to its weight."""

_ORACLE = "reference"  # dense work plus masking: never faster, so never a candidate


@dataclass(frozen=True)
class Case:
    """A linear layer, its input and its density.

    Args:
        tokens: Number of rows of the flattened input.
        out_features: Number of rows of the weight.
        in_features: Number of columns of the weight.
        block_size: Side of a mask block, or its rows and columns, in weights.
        density: Active share of the blocks, in (0, 1].
        dtype: Dtype of the products (under autocast, autocast's).
        device: Device of the operands.
        frozen: Whether forward and dX are dense, and only dW sparse.
        transposed: Whether the weight is stored ``(in, out)``, as in Hugging Face's ``Conv1D``.

    Raises:
        ValueError: A size or density is out of range.
    """

    tokens: int
    out_features: int
    in_features: int
    block_size: BlockSize
    density: float
    dtype: torch.dtype
    device: torch.device
    frozen: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        _check(self, ["tokens"], ["out_features", "in_features"])

    @property
    def flops(self) -> float:
        """FLOPs of a dense forward and backward."""
        return 6.0 * self.tokens * self.out_features * self.in_features

    def topology(self) -> BlockTopology:
        """A random topology of this shape and density, always the same one."""
        return _topology(self, self.out_features, self.in_features)

    def refusal(self, backend: str) -> str | None:
        """Reason why that backend cannot run this case, or None."""
        return get_backend(backend).unsupported(self.device, self.dtype, self.topology())

    def problem(self) -> _Problem:
        """Random operands, and the layer's forward on them."""
        random, topology = _random(self), self.topology()
        weight = random(self.out_features, self.in_features) * topology.weight_mask()
        stored = weight.t().contiguous() if self.transposed else weight
        leaves = [random(self.tokens, self.in_features), stored, random(self.out_features)]

        def forward(name: str) -> Tensor:
            x, stored, bias = leaves
            matrix = stored.t() if self.transposed else stored
            if name == DENSE:
                return F.linear(x, matrix, bias)
            return masked_linear(x, matrix, bias, topology, backend=name, frozen=self.frozen)

        return _Problem(leaves, random(self.tokens, self.out_features), forward)


@dataclass(frozen=True)
class ConvCase:
    """A 2-D convolution (of one group, zeros around the image), its input and its density.

    Args:
        batch: Number of images.
        height: Height of the input.
        width: Width of the input.
        out_channels: Number of output channels: block rows times the block size.
        in_channels: Number of input channels: block columns times the block size.
        geometry: Kernel, stride, padding, dilation.
        block_size: Side of a mask block, or its rows and columns, in channels; it holds all taps of the kernel, but for
            single weights (1), which are one tap each.
        density: Active share of the blocks, in (0, 1].
        dtype: Dtype of the products (under autocast, autocast's).
        device: Device of the operands.
        frozen: Whether forward and dX are dense, and only dW sparse.
        channels_last: Whether activations and weight lie in channels-last memory, else in contiguous.

    Raises:
        ValueError: A size or density is out of range.
    """

    batch: int
    height: int
    width: int
    out_channels: int
    in_channels: int
    geometry: ConvGeometry
    block_size: BlockSize
    density: float
    dtype: torch.dtype
    device: torch.device
    frozen: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        _check(self, ["batch", "height", "width"], ["out_channels", "in_channels"])
        if min(self.geometry.output_size(self.height, self.width)) < 1:
            raise ValueError(f"an input of {self.height} x {self.width} is too small for {self.geometry}")

    @property
    def flops(self) -> float:
        """FLOPs of a dense forward and backward."""
        taps, pixels = self.geometry.kernel_size, self.geometry.output_size(self.height, self.width)
        return 6.0 * self.batch * math.prod((*taps, *pixels)) * self.out_channels * self.in_channels

    def topology(self) -> BlockTopology:
        """A random topology of these channels and this density, always the same one; single weights have taps."""
        taps = math.prod(self.geometry.kernel_size) if self.block_size == 1 else 1
        return _topology(self, self.out_channels, self.in_channels * taps)

    def refusal(self, backend: str) -> str | None:
        """Reason why that backend cannot run this case, or None."""
        return conv_refusal(backend, self.device, self.dtype, self.topology(), self.geometry)

    def problem(self) -> _Problem:
        """Random operands, and the layer's forward on them."""
        random, topology, g = _random(self), self.topology(), self.geometry
        memory = memory_format(self.channels_last)
        weight = random(self.out_channels, self.in_channels, *g.kernel_size) * topology.mask_over(
            (self.out_channels, self.in_channels, *g.kernel_size)
        )
        x = random(self.batch, self.in_channels, self.height, self.width)
        dy = random(self.batch, self.out_channels, *g.output_size(self.height, self.width))
        leaves = [
            x.contiguous(memory_format=memory),
            weight.contiguous(memory_format=memory),
            random(self.out_channels),
        ]

        def forward(name: str) -> Tensor:
            x, weight, bias = leaves
            if name == DENSE:
                return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation)
            return masked_conv2d(x, weight, bias, topology, g, backend=name, frozen=self.frozen)

        return _Problem(leaves, dy, forward)


@dataclass(frozen=True)
class _Problem:
    """Operands of a case, and its forward.

    Attributes:
        leaves: Input, weight and bias.
        dy: Gradient of the output.
        forward: Forward on the leaves, by the name of what computes it.
    """

    leaves: list[Tensor]
    dy: Tensor
    forward: Callable[[str], Tensor]


def _check(case: Case | ConvCase, positive: Sequence[str], whole_blocks: Sequence[str]) -> None:
    for name in positive:
        if (value := getattr(case, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if min(sides(case.block_size)) < 1:
        raise ValueError(f"block_size must be at least 1, got {case.block_size}")
    for name, side in zip(whole_blocks, sides(case.block_size), strict=True):
        value = getattr(case, name)
        if value < 1 or value % side:
            raise ValueError(f"{name} must be a positive multiple of block size {side}, got {value}")
    if not 0.0 < case.density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {case.density}")


def _topology(case: Case | ConvCase, out: int, inner: int) -> BlockTopology:
    rows, cols = mask_shape((out, inner), case.block_size)
    generator = torch.Generator().manual_seed(0)
    active = max(1, round(case.density * rows * cols))
    mask = torch.zeros(rows * cols, dtype=torch.bool, device="cpu")
    mask[torch.randperm(rows * cols, generator=generator, device="cpu")[:active]] = True
    return BlockTopology.from_mask(mask.view(rows, cols).to(case.device), case.block_size)


def _random(case: Case | ConvCase) -> Callable[..., Tensor]:
    """Return a maker of random tensors of the case's dtype; always the same ones, and no global state is touched."""
    # On the device: the images of a large batch would take seconds on the CPU.
    generator = torch.Generator(case.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=case.device, dtype=torch.float32)
        return values.to(case.dtype)

    return random


# ---- naming a layer: in saved states, and in the files of timings


def layer_of(case: Case | ConvCase) -> dict[str, Any]:
    """All of a case but its density, in plain types.

    The device by its type, without an index: a resumed run may sit on another device of the same machine.
    """
    layer = asdict(case)
    del layer["density"]
    layer |= {"dtype": str(case.dtype).removeprefix("torch."), "device": case.device.type}
    layer |= layer.pop("geometry", {})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in layer.items()}


def layer_key(layer: Mapping[str, Any]) -> str:
    """One string for what `layer_of` returned."""
    return json.dumps(layer, sort_keys=True)


def _names(*classes: type) -> frozenset[str]:
    return frozenset(field.name for cls in classes for field in fields(cls)) - {"density", "geometry"}


_LAYERS = (_names(Case), _names(ConvCase, ConvGeometry))


def is_layer(layer: Any) -> bool:
    """Whether something has the fields that `layer_of` returns."""
    from lightning_estdgm.sparse.autotune._expert_case import ExpertCase  # it builds on this module

    return isinstance(layer, Mapping) and frozenset(layer) in (*_LAYERS, _names(ExpertCase))


# ---- what is timed for a case


_COUNTED = ("tokens", "batch")


def measured_case(case: Case | ConvCase) -> Case | ConvCase:
    """Return the case that is timed for a layer: with the density and the number of tokens or images of its bucket."""
    changes: dict[str, Any] = {name: count_bucket(getattr(case, name)) for name in _COUNTED if hasattr(case, name)}
    return replace(case, density=bucket_of(case.density) / BUCKETS, **changes)


def count_of(case: Case | ConvCase) -> tuple[int, str]:
    """Return the number of tokens or images of a case, and which of these it is."""
    return (case.batch, "images") if isinstance(case, ConvCase) else (case.tokens, "tokens")


def bucketed(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `layer_of` returned, with the number of tokens or images of its bucket."""
    return {name: count_bucket(value) if name in _COUNTED else value for name, value in layer.items()}


def refusals(case: Case | ConvCase) -> dict[str, str | None]:
    """Return for each backend that could be faster than dense the reason why it cannot run `case`, or None."""
    return {name: case.refusal(name) for name in backends() if name != _ORACLE}
