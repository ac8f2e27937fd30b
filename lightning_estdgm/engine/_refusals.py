"""Checks that a controller's parts fit: the update rule to the weights, a checkpoint to the run. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_estdgm.engine._admission import HEADS
from lightning_estdgm.engine._masked_weight import MaskedWeight
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
        if rule.pattern is not None and not weight.candidate.kind.inputs_last:
            raise ValueError(
                f"layer {weight.name!r} stacks experts whose inputs are not known to be the last dimension, "
                "along which a pattern would lie: leave it out by selection.exclude, or use no pattern"
            )
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
        raise ValueError(
            f"redistribute needs units of one size in all layers, got (weights in a unit: layer) {sizes}: give a size "
            "that fits all, such as Units(size=1), or exclude layers"
        )


def check_state(
    state: Mapping[str, Any],
    version: int,
    schedule: Mapping[str, Any],
    weights: Sequence[MaskedWeight],
    can_wait: Callable[[MaskedWeight], bool],
) -> None:
    """Raise ValueError if a controller's state belongs to another model, schedule or version.

    Args:
        state: result of `DGMController.state_dict`.
        version: version of states that this package reads.
        schedule: settings of the schedule that the state must have.
        weights: weights of this run's model that can be masked; those that the state leaves dense may be missing in it,
            but no output head that it leaves dense and this run includes.
        can_wait: whether a weight may stay dense; a packed one cannot.

    """
    if state.get("version") != version:
        raise ValueError(
            f"expected a state of version {version}, got {state.get('version')!r}: load it with the "
            "lightning_estdgm that wrote it, or remove it from the checkpoint, and masks are recovered from the weights"
        )
    if state["schedule"] != schedule:
        raise ValueError(
            f"the checkpoint was made with another schedule: its settings are {state['schedule']}, this run's are "
            f"{schedule}. Pass those to DGMConfig(schedule=...) to go on; to train on under this run's, load the "
            "weights and begin a run without ckpt_path="
        )
    theirs = {name: (tuple(x["shape"]), x["block_size"]) for name, x in state["layers"].items()}
    optional = {weight.name for weight in weights if weight.candidate.seems_head}
    included = {weight.name for weight in weights if weight.candidate.why == "included"}
    dense = state.get("dense_layers", {})
    optional |= {name for name, why in dense.items() if not (name in included and why in HEADS)}
    optional |= {*state.get("waiting_layers", ())}
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
            f"{differing}; {first!r} is {theirs.get(first)} there and {ours.get(first)} here (shape, block size). Pass "
            "that run's model, and its units= and selection= to DGMConfig, with the same layers frozen"
        )
    if masked := [weight.name for weight in weights if weight.name not in theirs and not can_wait(weight)]:
        why = dense.get(masked[0], "it had not trained yet")
        raise ValueError(
            f"the run of the checkpoint had {len(masked)} layers dense that storage='packed' masks before it is read; "
            f"{masked[0]!r} there: {why}. Leave them out, Selection(exclude={masked}), or use storage='dense'"
        )
