"""First masks: units, seed and initial weights."""

import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import SCHEDULE, STEPS, WEIGHTS, adamw, refuse, sgd
from helpers.masked_weights import masked_weight, numbered
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._initialisation import describe_recovered, describe_zeros, draw_masks, keep_zeros
from lightning_estdgm.method._patterns import NofM
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
    with DGMController(model, adamw(model), config, total_steps=STEPS, audit=False) as dgm:
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
            model, adamw(model), DGMConfig(SCHEDULE, units=Units(size=1), seed=seed), total_steps=STEPS, audit=False
        ) as dgm:
            return dgm.masks()["0"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_a_forced_block_that_does_not_fit_is_refused_with_the_layers_name(mlp):
    message = r"Units\(size=64\) does not fit layer '2' with weight \(96, 128\): block sizes that do are \[1, .*, 32\]"
    refuse(mlp(64, 128, 96, 4), message, DGMConfig(SCHEDULE, units=Units(size=64)))


def test_an_automatic_block_falls_back_and_says_so(mlp):
    model = mlp(64, 100, 128, 128, 4)
    with DGMController(
        model, adamw(model), DGMConfig(SCHEDULE, backend="dense"), total_steps=STEPS, audit=False
    ) as dgm:
        assert [(d.name, d.block_size) for d in dgm.decisions() if d.masked] == [("0", 1), ("2", 1), ("4", 16)]
        assert "no block of 16, 32, 64, 128 divides both dimensions" in dgm.decisions()[0].why
        assert dgm.decisions()[2].why == ""


def test_an_older_run_keeps_its_units_where_automatic_blocks_are_others_now():
    model = nn.Sequential(nn.Conv2d(128, 128, 1), nn.Flatten(), nn.Linear(128, 4))
    config = DGMConfig(SCHEDULE, backend="dense")
    with DGMController(model, sgd(model), config.merged(units={"size": 1}), total_steps=STEPS, audit=False) as dgm:
        state = dgm.state_dict()
        masks = dgm.masks()
    with DGMController(model, sgd(model), config, total_steps=STEPS, state=state, audit=False) as resumed:
        assert resumed.decisions()[0].block_size == 1
        assert resumed.decisions()[0].why == "single weights as in the checkpoint"
        assert torch.equal(resumed.masks()["0"], masks["0"])
    model[0].reset_parameters()  # no zeros
    with DGMController(model, sgd(model), config, total_steps=STEPS, audit=False) as new:
        assert new.decisions()[0].block_size == 16


def test_layers_that_do_not_fit_are_named(mlp):
    model = mlp(12, 24, 10, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    message = "layer '0': N:4 needs a density that is a whole number of 4ths in every layer, got 0."
    with pytest.raises(ValueError, match=f'{re.escape(message)}.*distribution="uniform".* a density of n / 4'):
        DGMController(
            model, optimizer, preset("rigl", 0.3, update_rule={"pattern": NofM(4)}), total_steps=8, audit=False
        )


@pytest.mark.parametrize(
    ("values", "budget", "kept"),
    [
        ([[5.0, 0.0]], 1, True),
        ([[5.0, 6.0]], 1, False),  # all of its units hold weights: the mask is drawn among them
        ([[5.0, 0.0]], 2, False),  # nothing will be inactive
        ([[0.0, 0.0]], 1, False),  # it starts from zero, as an adapter does
    ],
)
def test_zeros_of_an_earlier_mask_are_kept_and_told(values, budget, kept):
    weight = masked_weight(torch.tensor(values), torch.ones(1, 2, dtype=torch.bool))
    found = keep_zeros([weight], [[budget]])
    assert found == [weight] * kept
    assert weight.whole_mask().tolist() == ([[True, False]] if kept else [[True, True]])
    assert weight.weight.tolist() == values
    message = describe_zeros(found, 2)
    assert bool(message) == kept
    if kept:
        assert message.startswith(
            "1 of 2 masked layers (0) hold zeros as an earlier mask leaves them: what is not zero"
        )


@pytest.mark.parametrize(
    ("inactive", "held", "told"),
    [
        ("zero", 2, "hold as many zeros as the schedule leaves: their masks are what they were"),
        ("zero", 1, "hold more zeros than the schedule leaves: some of these units are active again, drawn at random"),
        (
            "zero",
            3,
            "hold fewer zeros than the schedule leaves: the largest units stay active, the rest is set to zero",
        ),
        ("frozen", 3, "the largest units stay active, the rest is kept as it is, without updates"),
    ],
)
def test_recovered_masks_are_told_by_what_was_found(inactive, held, told):
    message = describe_recovered([numbered([[1, 1], [0, 0]], inactive=inactive)] * 4, [held] * 4)
    assert message.startswith("4 of 4 masked layers (0, 0, 0, ...) hold ")
    assert message.endswith(told)


def test_initial_weights_that_hold_zeros_of_an_earlier_mask_are_not_scaled_again():
    mask = torch.tensor([[True, False], [False, False]])
    for values, scale in ((torch.ones(2, 2), 2.0), (torch.ones(2, 2) * mask, 1.0)):
        weight = masked_weight(values, torch.ones(2, 2, dtype=torch.bool))
        held = draw_masks([weight], [[1]], WEIGHTS)
        assert held == [int(values.sum())]
        assert weight.active == 1
        assert torch.equal(weight.weight, scale * weight.mask)


def test_the_largest_units_are_taken_to_recover_a_mask_and_nothing_is_scaled():
    weight = numbered([[1, 1], [1, 1]])
    assert draw_masks([weight], [[2]], WEIGHTS, largest=True) == [4]
    assert weight.weight.tolist() == [[0, 0], [3, 4]]
