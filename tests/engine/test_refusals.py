"""Checks before a run goes on: the rule fits the weights, the checkpoint is one of this run."""

import re

import pytest
import torch

from helpers.controller_runs import BLOCKS, STEPS, WEIGHTS, adamw, refuse
from helpers.masked_weights import numbered, sharded_weight
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._refusals import check_rule, check_state
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.method._update_rule import UpdateRule


@pytest.mark.parametrize(
    ("widths", "config", "total_steps", "message"),
    [
        (
            (32, 64, 4),
            DGMConfig(EstDgm(update_every=4), units=Units(size=1)),
            40,
            "made with another schedule: its settings are {'explor.*DGMConfig\\(schedule=...\\) to go on",
        ),
        (
            (32, 80, 4),
            WEIGHTS,
            40,
            "made with another model .*they differ in \\['0'\\]; '0' is \\(\\(64, 32\\), 1\\) there",
        ),
        ((32, 64, 64, 4), WEIGHTS, 40, "they differ in \\['2'\\]; '2' is None there and \\(\\(64, 64\\), 1\\) here"),
        ((32, 64, 4), BLOCKS, 40, "'0' is \\(\\(64, 32\\), 1\\) there and \\(\\(64, 32\\), 16\\) here"),
    ],
)
def test_a_state_of_another_model_or_schedule_is_refused(mlp, widths, config, total_steps, message):
    model = mlp(32, 64, 4)
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        state = dgm.state_dict()
    refuse(mlp(*widths), message, config, total_steps=total_steps, state=state)


def test_a_state_of_another_version_is_refused_and_changes_nothing(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        before = dgm.masks()["0"]
        for state in ({}, dgm.state_dict() | {"version": 99}):
            with pytest.raises(ValueError, match=f"expected a state of version 1, got {state.get('version')}"):
                dgm.load_state_dict(state)
        other = dgm.state_dict() | {"schedule": {}, "steps": 3}
        with pytest.raises(ValueError, match="another schedule"):
            dgm.load_state_dict(other)
        assert dgm.steps == 0
        assert torch.equal(dgm.masks()["0"], before)


# ------------------------------------------------------------------ the checks by themselves


def state_of(weight, **changes):
    """Return the entries of a controller's state that are compared."""
    layers = {weight.name: {"shape": list(weight.shape), "block_size": weight.block_size}}
    return {"version": 1, "total_steps": 40, "schedule": {"cycles": 1}, "layers": layers} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected a state of version 1, got 2"),
        ({"schedule": {"cycles": 2}}, "its settings are {'cycles': 2}, this run's are {'cycles': 1}"),
        (
            {"layers": {"0": {"shape": [2, 3], "block_size": 1}}},
            "they differ in ['0']; '0' is ((2, 3), 1) there and ((2, 2), 1) here",
        ),
        ({"layers": {}}, "they differ in ['0']; '0' is None there and ((2, 2), 1) here"),
    ],
)
def test_the_entry_that_differs_is_named(changes, message):
    weight = numbered([[1, 0], [0, 1]])
    expected = {"cycles": 1}
    check_state(state_of(weight), 1, expected, [weight], lambda _: True)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_state(state_of(weight, **changes), 1, expected, [weight], lambda _: True)


def test_a_layer_that_was_dense_and_is_packed_is_refused_with_the_way_out():
    weight = numbered([[1, 0], [0, 1]])
    state = state_of(weight, layers={}, dense_layers={"0": "its weight is used by itself"})
    check_state(state, 1, {"cycles": 1}, [weight], lambda _: True)
    message = (
        "'0' there: its weight is used by itself. Leave them out, Selection(exclude=['0']), or use storage='dense'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_state(state, 1, {"cycles": 1}, [weight], lambda _: False)


def test_redistribution_needs_units_of_one_size():
    weights = [numbered([[1, 0]]), numbered([[1, 0]], block_size=2)]
    check_rule(UpdateRule(), weights, changes_masks=True)
    check_rule(UpdateRule(redistribute="global"), weights[:1], changes_masks=True)
    with pytest.raises(ValueError, match=r"needs units of one size in all layers, got .* {1: '0', 4: '0'}"):
        check_rule(UpdateRule(redistribute="global"), weights, changes_masks=True)


def test_what_needs_whole_weights_is_refused_for_sharded_ones():
    rule = UpdateRule(grow="random")
    weight = sharded_weight((4, 4))
    check_rule(UpdateRule(), [weight], changes_masks=True)
    check_rule(rule, [weight], changes_masks=False)  # nothing is ever grown
    with pytest.raises(
        ValueError, match=r"layer '0' is sharded over ranks, where masks are updated by .* grow='random'"
    ):
        check_rule(rule, [weight], changes_masks=True)
    learning = sharded_weight((4, 4), inactive=BackwardSet())
    with pytest.raises(ValueError, match="layer '0' is sharded over ranks, where inactive weights cannot go on learn"):
        check_rule(UpdateRule(), [learning], changes_masks=False, trains_inactive=True)
