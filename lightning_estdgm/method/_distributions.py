"""Budgets of layers from one density of the whole. Pure functions of shapes.

Weights and gradients have no part here: redistributions by scores are in `_redistribution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from lightning_estdgm._checks import check_share

Shape = Sequence[int]


def uniform(shapes: Sequence[Shape], density: float) -> list[float]:
    """Return the same density for every layer.

    Raises:
        ValueError: if `density` lies outside (0, 1].

    """
    check_share("density", density)
    return [density] * len(shapes)


def erk(shapes: Sequence[Shape], density: float) -> list[float]:
    r"""Return Erdős–Rényi-kernel densities: proportional to ``sum(dims) / prod(dims)``, at most 1.

    .. math:: \rho_l = \min(1, \epsilon \, \textstyle\sum_d s_{l,d} / \prod_d s_{l,d})

    with :math:`\epsilon` such that `density` of all weights is active. Source: Evci et al., "Rigging the
    Lottery" (arXiv 1911.11134), section 3; Mocanu et al. (2018) for linear layers.

    Args:
        shapes: weight shapes ``(out, in, *kernel)``.
        density: active share of the weights of all layers, in (0, 1].

    Raises:
        ValueError: if `density` lies outside (0, 1].

    """
    check_share("density", density)
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest:
            return [1.0] * len(shapes)
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if epsilon * raw[i] > 1.0}
        if not over:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= over


DistributionName = Literal["erk", "uniform"]
"""Names of `DISTRIBUTIONS`, for LightningCLI."""

DISTRIBUTIONS: dict[str, Callable[[Sequence[Shape], float], list[float]]] = {"erk": erk, "uniform": uniform}
"""Known distributions by name; `Units.distribution` also takes such a function itself."""


def allocate(
    unit_counts: Sequence[int], unit_sizes: Sequence[int], densities: Sequence[float], density: float
) -> list[int]:
    """Round layer densities to whole units, within the budget of the whole.

    Each layer gets the floor of its share; what remains of ``round(density * weights)`` goes to the layers with the
    largest remainders, in layer order where they tie. Every layer keeps at least one unit.

    Args:
        unit_counts: number of units of each layer.
        unit_sizes: number of weights in one unit of each layer.
        densities: density of each layer, in (0, 1].
        density: density of the whole, in (0, 1].

    Returns:
        Number of active units of each layer. Their weights miss the budget by at most half the largest unit, and not at
        all if all units are single weights (unless one unit a layer is already more than the budget).

    Raises:
        ValueError: if `density` lies outside (0, 1].

    """
    check_share("density", density)
    counts = list(unit_counts)
    ideal = [
        min(Fraction(n), Fraction(rho).limit_denominator(10**12) * n) for n, rho in zip(counts, densities, strict=True)
    ]
    units = [max(1, math.floor(x)) for x in ideal]
    budget = round(density * sum(n * size for n, size in zip(counts, unit_sizes, strict=True)))
    left = budget - sum(k * size for k, size in zip(units, unit_sizes, strict=True))
    order = sorted(range(len(counts)), key=lambda i: (units[i] - ideal[i], i))
    # Floors leave less than one unit a layer, so one round spends what is left, to the nearest unit ...
    for i in order:
        if left > 0 and unit_sizes[i] <= 2 * left and units[i] < counts[i]:
            units[i] += 1
            left -= unit_sizes[i]
    # ... and where "at least one unit" overspent, the layers with most to spare give back.
    while left < 0 and max(units) > 1:
        i = max(range(len(units)), key=lambda i: (units[i] * unit_sizes[i] if units[i] > 1 else 0, -i))
        if unit_sizes[i] > -2 * left:
            break
        units[i] -= 1
        left += unit_sizes[i]
    return units
