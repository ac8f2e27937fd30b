"""Checks before a run goes on: the rule fits the weights, the checkpoint is one of this run."""

import pytest
import torch

from helpers.controller_runs import BLOCKS, STEPS, WEIGHTS, adamw, refuse
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.method.schedules import EstDgm


@pytest.mark.parametrize(
    ("widths", "config", "total_steps", "message"),
    [
        ((32, 64, 4), WEIGHTS, 41, "made with another schedule: its total_steps is 40, this run's is 41"),
        (
            (32, 64, 4),
            DGMConfig(EstDgm(update_every=4), units=Units(size=1)),
            40,
            "made with another schedule: its schedule is {'explor",
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
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS) as dgm:
        state = dgm.state_dict()
    refuse(mlp(*widths), message, config, total_steps=total_steps, state=state)


def test_a_state_of_another_version_is_refused_and_changes_nothing(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        before = dgm.masks()["0"]
        for state in ({}, dgm.state_dict() | {"version": 99}):
            with pytest.raises(ValueError, match=f"expected a state of version 1, got {state.get('version')}"):
                dgm.load_state_dict(state)
        other = dgm.state_dict() | {"total_steps": 7, "steps": 3}
        with pytest.raises(ValueError, match="another schedule"):
            dgm.load_state_dict(other)
        assert dgm.steps == 0
        assert torch.equal(dgm.masks()["0"], before)
