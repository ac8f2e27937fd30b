"""Budgets: active units of each part of each layer."""

import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import STEPS, fit, run, sgd
from helpers.masked_weights import candidates_of
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._budget import LayerUnits, unit_budgets
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.method._update_rule import UpdateRule


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
        DGMController(
            model, sgd(model), DGMConfig(units=Units(distribution=distribution, size=1)), total_steps=STEPS, audit=False
        )


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
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
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
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm)
    assert not dgm.masks()["0"].chunk(3)[2].any()


# ------------------------------------------------------------------ budgets by themselves


def layer(out, inner, parts=1, unit=1):
    return LayerUnits((out // parts, inner), parts, out * inner // unit, unit)


def test_each_part_of_each_layer_has_its_share_of_a_uniform_budget():
    assert unit_budgets([layer(24, 8, parts=3), layer(16, 8)], "uniform", 0.25) == [[16, 16, 16], [32]]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_budgets_hold_as_many_weights_as_the_density_asks_for(distribution, density):
    layers = [layer(64, 32, parts=2, unit=16), layer(96, 64, unit=16), layer(32, 16, unit=16)]
    budgets = unit_budgets(layers, distribution, density)
    assert [len(budget) for budget in budgets] == [2, 1, 1]
    held = sum(sum(budget) * x.unit_size for budget, x in zip(budgets, layers, strict=True))
    assert abs(held - density * sum(x.units * x.unit_size for x in layers)) <= 8
    assert all(0 < k <= x.units // x.parts for budget, x in zip(budgets, layers, strict=True) for k in budget)


def test_a_function_is_asked_for_each_part_by_its_shape():
    asked = []

    def densities(shapes, density):
        asked.append((shapes, density))
        return [0.5, 0.5, 0.25]

    assert unit_budgets([layer(8, 4, parts=2), layer(8, 4)], densities, 0.375) == [[8, 8], [8]]
    assert asked == [([(4, 4), (4, 4), (8, 4)], 0.375)]
    with pytest.raises(ValueError, match=r"must keep to the density 0\.5 of the whole, got 0\.375"):
        unit_budgets([layer(8, 4, parts=2), layer(8, 4)], densities, 0.5)
    with pytest.raises(ValueError, match="must return 1 densities"):
        unit_budgets([layer(8, 4)], densities, 0.375)


def test_units_of_a_fused_layer_are_counted_by_part():
    fused, plain, _ = candidates_of((96, 32), (32, 96), (4, 4), names=("qkv", "out", "last"))
    assert LayerUnits.of(fused, 16) == LayerUnits((32, 32), parts=3, units=12, unit_size=256)
    assert LayerUnits.of(plain, 1) == LayerUnits((32, 96), parts=1, units=32 * 96, unit_size=1)
