"""Cost of a mask unit to a loss: the measured time of a step, times the steps that the unit needs.

Coarse units are faster and learn worse: to reach the loss of single weights they need more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.sparse.autotune._cases import DENSE
from lightning_estdgm.sparse.autotune._choice import Choice

Aim = Literal["auto", "finest", "fastest"]
"""Unit of least cost to a loss, the finest that is computed faster than dense, or that of the fastest step."""

AIMS: tuple[Aim, ...] = ("auto", "finest", "fastest")

STEPS_TO_A_LOSS: Mapping[BlockSize, float] = MappingProxyType({1: 1.0, (4, 1): 1.13, 4: 1.27, 16: 1.71, 64: 1.9})
"""Units that are timed, the finest first, and the steps each needs to the loss of single weights.

From docs/results/study/units.csv, by `estdgm study --preset units`: a byte-level GPT of width 256 in one pass over its
text of 1,000 steps, final density 0.10, one seed, each unit kept as by default; the loss of single weights over their
steps, read at the loss of each unit. In much shorter runs coarse units lose less.
"""

_FINER = 0.9
"""A coarser unit replaces a finer one where it costs less than this share: noise does not choose."""

_MOST = 0.9
"""Time of a product over that of dense and its density, at the least: no unit was measured to need less."""


def choose_unit(
    sizes: Sequence[BlockSize], timed: Callable[[BlockSize], Choice], density: float, aim: Aim
) -> tuple[BlockSize, dict[BlockSize, float]]:
    """Return the mask unit of a layer, and the costs that decided, of the units that were timed.

    A cost is a time over that of dense within the same rounds, times the steps that the unit needs.

    Units are timed from the finest to the coarsest; one that could not cost less if nothing but its active weights took
    time is not timed. Where none is computed faster than dense, the finest is as fast as the others, and learns best.

    Args:
        sizes: units that fit the layer and that a backend computes, the finest first; at least one.
        timed: measures a unit: the choice between dense and sparse, with their seconds.
        density: active share of the layer's weights.
        aim: what is chosen.

    """
    costs: dict[BlockSize, float] = {}
    best = sizes[0]
    for size in sizes:
        steps = STEPS_TO_A_LOSS[size] if aim == "auto" else 1.0
        if costs and steps * _MOST * density >= _FINER * costs[best]:
            continue
        choice = timed(size)
        assert choice.dense_s is not None
        assert choice.sparse_s is not None
        is_faster = choice.backend != DENSE
        costs[size] = steps * (choice.sparse_s / choice.dense_s if is_faster else 1.0)
        if aim == "finest":
            if is_faster:
                return size, costs
        elif costs[size] < _FINER * costs[best]:
            best = size
    return best, costs
