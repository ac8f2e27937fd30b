"""Checks that a controller's parts fit: the update rule to the weights, a checkpoint to the run. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._update_rule import UpdateRule


def check_rule(rule: UpdateRule, weights: Sequence[MaskedWeight], *, changes_masks: bool) -> None:
    """Raise ValueError if the rule cannot update a weight.

    Args:
        rule: update rule of the run.
        weights: the masked weights.
        changes_masks: whether the schedule has any mask update.

    """
    for weight in weights:
        if rule.pattern is not None and not weight.candidate.kind.inputs_last:
            raise ValueError(
                f"layer {weight.name!r} stacks experts whose inputs are not known to be the last dimension, "
                "along which a pattern would lie: leave it out by selection.exclude, or use no pattern"
            )
        if not weight.placement.is_sharded:
            continue
        if weight.inactive.learn:
            raise ValueError(
                f"layer {weight.name!r} is sharded over ranks, where inactive weights cannot go on learning "
                "(a BackwardSet): use DDP"
            )
        if changes_masks:
            rule.check_sharded(weight.name, weight.block_size)
    sizes = {weight.unit_size: weight.name for weight in weights}
    if rule.redistribute is not None and len(sizes) > 1:
        raise ValueError(f"redistribute needs units of one size in all layers, got (weights in a unit: layer) {sizes}")


def check_state(
    state: Mapping[str, Any], version: int, expected: Mapping[str, Any], weights: Sequence[MaskedWeight]
) -> None:
    """Raise ValueError if a controller's state belongs to another model, schedule, run length or version.

    Args:
        state: result of `DGMController.state_dict`.
        version: version of states that this package reads.
        expected: entries that have to be equal in the state, by name.
        weights: masked weights of this run's model.

    """
    if state.get("version") != version:
        raise ValueError(f"expected a state of version {version}, got {state.get('version')!r}")
    for name, mine in expected.items():
        if state[name] != mine:
            raise ValueError(
                f"the checkpoint was made with another schedule: its {name} is {state[name]}, this run's is {mine}"
            )
    theirs = {name: (tuple(x["shape"]), x["block_size"]) for name, x in state["layers"].items()}
    ours = {weight.name: (weight.shape, weight.block_size) for weight in weights}
    if theirs != ours:
        differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        first = differing[0]
        raise ValueError(
            "the checkpoint was made with another model or other masked layers: they differ in "
            f"{differing}; {first!r} is {theirs.get(first)} there and {ours.get(first)} here (shape, block size)"
        )
