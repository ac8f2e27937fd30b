"""First masks: units, seed and initial weights."""

import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import SCHEDULE, STEPS, WEIGHTS, adamw, refuse, sgd
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.method.patterns import NofM
from lightning_estdgm.presets import preset


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (WEIGHTS, True),
        (DGMConfig(SCHEDULE, units=Units(size=1), step_size=StepSize(scale_initial_weights=False)), False),
    ],
)
def test_initial_weights_are_scaled(mlp, config, factor):
    model, plain = mlp(32, 128, 64, 4), mlp(32, 128, 64, 4)
    with DGMController(model, adamw(model), config, total_steps=STEPS) as dgm:
        for name, mask in dgm.masks().items():
            scale = dgm.layer_densities()[name] ** -0.5 if factor else 1.0
            expected = plain.get_submodule(name).weight * mask * scale
            torch.testing.assert_close(model.get_submodule(name).weight, expected)
    assert torch.equal(model[4].weight, plain[4].weight)


def test_the_seed_decides_the_first_masks_and_nothing_else_does(mlp):
    def first(seed):
        torch.seed()
        model = mlp(32, 64, 4)
        with DGMController(
            model, adamw(model), DGMConfig(SCHEDULE, units=Units(size=1), seed=seed), total_steps=STEPS
        ) as dgm:
            return dgm.masks()["0"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_a_forced_block_that_does_not_fit_is_refused_with_the_layers_name(mlp):
    message = r"block_size=64 does not fit layer '2' with weight \(96, 128\): block sizes that do are \(1, 16, 32\)"
    refuse(mlp(64, 128, 96, 4), message, DGMConfig(SCHEDULE, units=Units(size=64)))


def test_an_automatic_block_falls_back_and_says_so(mlp):
    model = mlp(64, 100, 128, 128, 4)
    with DGMController(model, adamw(model), DGMConfig(SCHEDULE, backend="dense"), total_steps=STEPS) as dgm:
        assert [(d.name, d.block_size) for d in dgm.decisions() if d.masked] == [("0", 1), ("2", 1), ("4", 16)]
        assert "no block of 16, 32, 64, 128 divides both dimensions" in dgm.decisions()[0].why
        assert dgm.decisions()[2].why == ""


def test_an_older_run_keeps_its_units_where_automatic_blocks_are_others_now():
    model = nn.Sequential(nn.Conv2d(128, 128, 1), nn.Flatten(), nn.Linear(128, 4))
    config = DGMConfig(SCHEDULE, backend="dense")
    with DGMController(model, sgd(model), config.merged(units={"size": 1}), total_steps=STEPS) as dgm:
        state = dgm.state_dict()
        masks = dgm.masks()
    with DGMController(model, sgd(model), config, total_steps=STEPS, state=state) as resumed:
        assert resumed.decisions()[0].block_size == 1
        assert resumed.decisions()[0].why == "units of 1 as in the checkpoint"
        assert torch.equal(resumed.masks()["0"], masks["0"])
    with DGMController(model, sgd(model), config, total_steps=STEPS) as new:
        assert new.decisions()[0].block_size == 16


def test_layers_that_do_not_fit_are_named(mlp):
    model = mlp(12, 24, 10, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for config, message in (
        (preset("n:m", 0.5, m=8), "layer '0': N:8 needs inputs that are a multiple of 8, got a mask of (24, 12)"),
        (
            preset("rigl", 0.3, update_rule={"pattern": NofM(4)}),
            "layer '0': N:4 needs a density that is a whole number of 4ths",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            DGMController(model, optimizer, config, total_steps=8)
