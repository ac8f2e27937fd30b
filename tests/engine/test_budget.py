"""Budgets: active units of each part of each layer."""

import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import STEPS, fit, run, sgd
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.method.schedules import EstDgm
from lightning_estdgm.method.update_rule import UpdateRule


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (lambda shapes, density: [density] * 5, "must return 2 densities in (0, 1], one for each layer"),
        (lambda shapes, density: [2.0, density], "must return 2 densities in (0, 1], one for each layer"),
        (lambda shapes, density: [density / 3] * 2, "must keep to the density 0.7 of the whole, got 0.233"),
    ],
)
def test_a_distribution_must_keep_to_the_budget(mlp, distribution, message):
    model = mlp(32, 64, 64, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        DGMController(model, sgd(model), DGMConfig(units=Units(distribution=distribution, size=1)), total_steps=STEPS)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.plain = nn.Linear(96, 96)
        self.last = nn.Linear(96, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.plain(torch.tanh(self.qkv(x)))))


@pytest.mark.parametrize("block_size", [1, 16])
def test_parts_of_a_fused_weight_have_budgets_of_their_own(block_size):
    torch.manual_seed(0)
    model = Fused()
    with torch.no_grad():
        model.qkv.weight[:64].mul_(10.0)  # queries and keys that would win every unit from the values
    optimizer = sgd(model)
    config = DGMConfig(EstDgm(update_every=4, observe_steps=2), units=Units(size=block_size, distribution="uniform"))
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        note = "3 fused matrices, each with its own budget"
        assert [note in d.why for d in dgm.decisions()] == [True, False, False]
        for _ in fit(model, optimizer, dgm):
            active = [int(part.sum()) for part in dgm.masks()["qkv"].chunk(3)]
            assert max(active) - min(active) <= 1
    assert dgm.masks()["qkv"].chunk(3)[2].any()


def test_without_parts_the_largest_weights_take_all():
    """The control: under another name the same weight is one layer, and its last third loses everything."""
    torch.manual_seed(0)
    model = Fused()
    with torch.no_grad():
        model.qkv.weight[:64].mul_(10.0)
    model = nn.Sequential(model.qkv, nn.Tanh(), model.plain, nn.Tanh(), model.last)
    optimizer = sgd(model)
    schedule = EstDgm(update_every=4, observe_steps=2)
    config = DGMConfig(
        schedule, units=Units(size=16, distribution="uniform"), update_rule=UpdateRule(drop_fraction=0.0)
    )
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm)
    assert not dgm.masks()["0"].chunk(3)[2].any()
