"""Checks that a controller's parts fit: the update rule to the weights, a checkpoint to the run. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._masks import mask_shape
from lightning_estdgm.method._patterns import Pattern, fitted
from lightning_estdgm.method._update_rule import UpdateRule


def check_rule(
    rule: UpdateRule, weights: Sequence[MaskedWeight], *, changes_masks: bool, trains_inactive: bool = False
) -> None:
    """Raise ValueError if the rule cannot update a weight.

    Args:
        rule: update rule of the run.
        weights: the weights that can be masked.
        changes_masks: whether the schedule has any mask update.
        trains_inactive: whether inactive weights go on learning.

    """
    for weight in weights:
        if not weight.placement.is_sharded:
            continue
        if trains_inactive:
            raise ValueError(
                f"layer {weight.name!r} is sharded over ranks, where inactive weights cannot go on learning "
                "(a BackwardSet): use DDP"
            )
        if changes_masks:
            rule.check_sharded(weight.name, weight.block_size)
    sizes = {weight.unit_size: weight.name for weight in weights if not weight.candidate.seems_head}
    if rule.redistribute is not None and len(sizes) > 1:
        raise ValueError(f"redistribute needs units of one size in all layers, got (weights in a unit: layer) {sizes}")


def check_pattern(pattern: Pattern | None, weights: Sequence[MaskedWeight], budgets: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if a pattern does not fit a weight, or not with its number of active units.

    Args:
        pattern: pattern of all masks; ``None``: none.
        weights: weights that will be masked.
        budgets: number of active units of each part of each weight.

    """
    if pattern is None:
        return
    for weight, budget in zip(weights, budgets, strict=True):
        with weight.naming_errors():
            for k in budget:
                fitted(pattern, torch.Size(mask_shape(weight.candidate.part_shape, weight.block_size)), k)


def check_state(
    state: Mapping[str, Any], version: int, expected: Mapping[str, Any], weights: Sequence[MaskedWeight]
) -> None:
    """Raise ValueError if a controller's state belongs to another model, schedule, run length or version.

    Args:
        state: result of `DGMController.state_dict`.
        version: version of states that this package reads.
        expected: entries that have to be equal in the state, by name.
        weights: weights of this run's model that can be masked; those that the state leaves dense may be missing in it.

    """
    if state.get("version") != version:
        raise ValueError(f"expected a state of version {version}, got {state.get('version')!r}")
    for name, mine in expected.items():
        if state[name] != mine:
            raise ValueError(
                f"the checkpoint was made with another schedule: its {name} is {state[name]}, this run's is {mine}"
            )
    theirs = {name: (tuple(x["shape"]), x["block_size"]) for name, x in state["layers"].items()}
    optional = {weight.name for weight in weights if weight.candidate.seems_head}
    optional |= {*state.get("dense_layers", ()), *state.get("waiting_layers", ())}
    ours = {
        weight.name: (weight.shape, weight.block_size)
        for weight in weights
        if weight.name in theirs or weight.name not in optional
    }
    if theirs != ours:
        differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        first = differing[0]
        raise ValueError(
            "the checkpoint was made with another model or other masked layers: they differ in "
            f"{differing}; {first!r} is {theirs.get(first)} there and {ours.get(first)} here (shape, block size)"
        )
