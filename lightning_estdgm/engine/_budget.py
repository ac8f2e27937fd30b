"""Budgets: the number of active units of each layer for a density of the whole, by a distribution over shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_estdgm.method import _distributions as distributions
from lightning_estdgm.method._masks import BlockSize, mask_shape, unit_size
from lightning_estdgm.modules._candidates import Candidate

Distribution = str | Callable[[Sequence[Sequence[int]], float], list[float]]


@dataclass(frozen=True)
class LayerUnits:
    """Shape, number and size of one layer's units, on which its budget depends.

    Attributes:
        part_shape: shape ``(out, in, ...)`` of one of the matrices that the weight stacks.
        parts: number of these matrices; each has a budget of its own.
        units: number of mask units of the whole weight.
        unit_size: number of weights in a unit.

    """

    part_shape: tuple[int, ...]
    parts: int
    units: int
    unit_size: int

    @classmethod
    def of(cls, candidate: Candidate, block_size: BlockSize) -> LayerUnits:
        """Return the sizes for a layer with mask units of `block_size` a side."""
        part = candidate.part_shape
        units = candidate.parts * math.prod(mask_shape(part, block_size))
        return cls(part, candidate.parts, units, unit_size(part, block_size))


def unit_budgets(layers: Sequence[LayerUnits], distribution: Distribution, density: float) -> list[list[int]]:
    """Return the number of active units of each part of each layer.

    Args:
        layers: the masked layers.
        distribution: name in `_distributions.DISTRIBUTIONS`, or a function ``(shapes, density) -> densities``.
        density: density of the whole, in (0, 1].

    Raises:
        ValueError: if the function returns anything but densities in (0, 1], one for each part, that keep to `density`.

    """
    function = distribution if callable(distribution) else distributions.DISTRIBUTIONS[distribution]
    owners = [layer for layer in layers for _ in range(layer.parts)]
    shapes = [layer.part_shape for layer in owners]
    shares = list(function(shapes, density))
    if len(shares) != len(shapes) or not all(0.0 < share <= 1.0 + 1e-9 for share in shares):
        raise ValueError(
            f"distribution must return {len(shapes)} densities in (0, 1], one for each layer, got {shares} "
            f"from {distribution!r}"
        )
    weights = [math.prod(shape) for shape in shapes]
    mean = sum(share * n for share, n in zip(shares, weights, strict=True)) / sum(weights)
    if not math.isclose(mean, density, rel_tol=0.01):
        raise ValueError(
            f"distribution must keep to the density {density:g} of the whole, got {mean:g} from {distribution!r}"
        )
    counts = [layer.units // layer.parts for layer in owners]
    units = iter(distributions.allocate(counts, [layer.unit_size for layer in owners], shares, density))
    return [[next(units) for _ in range(layer.parts)] for layer in layers]
