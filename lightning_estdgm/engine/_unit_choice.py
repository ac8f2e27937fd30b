"""Mask units of layers that are chosen by timing, for `Units(size="auto")` and its like."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lightning_estdgm._words import first_names
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._masks import BlockSize, unit_words
from lightning_estdgm.modules._mask_unit import roomy_units
from lightning_estdgm.sparse.autotune._cases import Case, ConvCase, layer_key, layer_of, measured_case, refusals
from lightning_estdgm.sparse.autotune._choice import BackendSelector, Choice
from lightning_estdgm.sparse.autotune._unit_cost import STEPS_TO_A_LOSS, Aim, choose_unit

_BLOCK = 16
"""The finest unit of `STEPS_TO_A_LOSS` that every backend computes."""


def times_units(config: DGMConfig) -> bool:
    """Whether units are chosen by timing: not with a forced backend, nor with a pattern, which is over given units."""
    return isinstance(config.units.size, str) and config.backend == "auto" and config.update_rule.pattern is None


def unit_cases(weight: MaskedWeight, case: Case | ConvCase) -> dict[BlockSize, Case | ConvCase]:
    """Return the units that a layer may have and that a backend computes, the finest first, each with its case.

    Args:
        weight: weight of the layer.
        case: case of the layer with any unit.

    """
    fitting = roomy_units(tuple(STEPS_TO_A_LOSS), weight.candidate.part_shape)
    sizes = [size for size in fitting if weight.has_operator_for(size)]
    cases = {size: replace(case, block_size=size) for size in sizes}
    return {size: case for size, case in cases.items() if not all(refusals(case).values())}


_AIMS = {
    "auto": "least time to a loss",
    "finest": "the finest that is computed faster than dense",
    "fastest": "least time of a step",
}


def choose_units(
    weights: Sequence[tuple[MaskedWeight, Case | ConvCase]],
    selector: BackendSelector,
    aim: Aim,
    say: Callable[[str], None] | None,
) -> tuple[dict[str, BlockSize], str]:
    """Return the unit of each layer that one can be chosen for, by the layer's name, and what decided in words.

    Layers that differ in nothing but some density, as budgets of whole units do, are timed once and get one unit. A
    weight with zeros of an earlier mask keeps its own.

    Args:
        weights: weights, each with a case of its layer at the density that its run ends with.
        selector: times the cases.
        aim: what is chosen.
        say: called with what will be timed; ``None``: nothing is said.

    """
    groups: dict[tuple[object, ...], list[tuple[MaskedWeight, Case | ConvCase]]] = {}
    for weight, case in weights:
        if weight.is_dense:
            fused = weight.candidate.part_shape, weight.placement.is_sharded
            groups.setdefault((layer_key(layer_of(measured_case(case))), *fused), []).append((weight, case))
    asked = {key: cases for key, same in groups.items() if (cases := unit_cases(*same[0]))}
    if aim == "auto":
        _warn_of_blocks((cases, [weight for weight, _ in groups[key]]) for key, cases in asked.items())
    if say is not None and (plan := selector.plan(case for cases in asked.values() for case in cases.values())):
        say(f"mask units: {plan}")
    found: dict[str, BlockSize] = {}
    told = []
    for key, cases in asked.items():
        density = next(iter(cases.values())).density
        unit, costs = choose_unit(list(cases), partial(_timed, selector, cases), density, aim)
        names = [weight.name for weight, _ in groups[key]]
        found |= dict.fromkeys(names, unit)
        spent = ", ".join(f"{unit_words(size)} {cost:.2f}" for size, cost in costs.items())
        told.append(f"{first_names(names)}: {unit_words(unit)} ({spent})")
    return found, f"Units by {_AIMS[aim]}, dense in as many steps = 1. {'; '.join(told)}." if told else ""


def _warn_of_blocks(layers: Iterable[tuple[Mapping[BlockSize, object], list[MaskedWeight]]]) -> None:
    """Warn where no finer unit than blocks is computed for most of the weights, as on GPUs: blocks learn worse."""
    blocks, every = 0, 0
    for cases, weights in layers:
        count = sum(math.prod(weight.shape) for weight in weights)
        every += count
        blocks += count * (STEPS_TO_A_LOSS[next(iter(cases))] >= STEPS_TO_A_LOSS[_BLOCK])
    if 2 * blocks > every:
        warnings.warn(
            f"no mask unit finer than {unit_words(_BLOCK)} is computed sparsely here. By such blocks a network took "
            f"{STEPS_TO_A_LOSS[_BLOCK]:.2f} times the steps of single weights to a loss (docs/results/study.md), and a "
            "narrower dense network was ahead at equal joules (docs/results/demo.md). Where the loss counts, compare "
            "with a narrower network, or mask single weights, which are computed dense: Units(size=1)",
            RuntimeWarning,
            stacklevel=2,
        )


def _timed(selector: BackendSelector, cases: Mapping[BlockSize, Case | ConvCase], size: BlockSize) -> Choice:
    return selector.timed(cases[size])
