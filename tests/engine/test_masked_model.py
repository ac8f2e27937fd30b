"""All masked weights of a model together."""

import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import STEPS, WEIGHTS, adamw, fit
from helpers.masked_weights import candidates_of
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._masked_model import MaskedModel
from lightning_estdgm.engine._observation import observe


def test_grown_weights_start_at_zero_with_a_clean_state(mlp):
    model = mlp(32, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    grown_any = dropped_any = False
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        before = dgm.masks()["0"]
        for _, updated in fit(model, optimizer, dgm):
            after = dgm.masks()["0"]
            changed = before ^ after
            assert updated or not changed.any()
            state = optimizer.state[model[0].weight]
            for tensor in (model[0].weight, state["exp_avg"], state["exp_avg_sq"]):
                assert torch.count_nonzero(tensor[changed]) == 0
            assert torch.count_nonzero(state["exp_avg"][after & before]) > 0
            grown_any |= bool((after & ~before).any())
            dropped_any |= bool((before & ~after).any())
            before = after
    assert grown_any
    assert dropped_any


def test_explored_and_churn(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        seen = dgm.masks()
        before = dgm.masks()
        assert dgm.explored == dgm.density
        total = 32 * 64 + 64 * 64
        for _, updated in fit(model, optimizer, dgm):
            now = dgm.masks()
            seen = {name: seen[name] | mask for name, mask in now.items()}
            assert dgm.explored == sum(int(m.sum()) for m in seen.values()) / total
            if updated:
                grown = sum(int((mask & ~before[name]).sum()) for name, mask in now.items())
                assert dgm.churn == grown / sum(int(m.sum()) for m in now.values())
            before = now


# ------------------------------------------------------------------ the weights by themselves


def small_model(inactive="zero", density=0.5):
    torch.manual_seed(0)
    candidates = candidates_of((8, 4), (16, 8), (2, 2))
    config = DGMConfig(units=Units(size=1, distribution="uniform"), inactive=inactive)
    model = MaskedModel(candidates, config, None, None)
    model.draw(model.weights, density)
    return model


def test_a_model_knows_its_density_and_every_layers_at_any_other():
    model = small_model()
    assert [weight.name for weight in model.weights] == ["0", "1"]
    assert model.density == model.explored == 0.5
    assert model.budgets(0.25) == [[8], [32]]
    assert model.layer_densities_at(0.25) == [0.25, 0.25]
    assert [d.final_density for d in model.decisions(0.25)] == [0.25, 0.25, 1.0]


def test_an_update_returns_what_it_brought_in_and_cleans_weights_gradients_and_states():
    model = small_model()
    states = {}
    for weight in model.weights:
        weight.parameter.grad = torch.rand_like(weight.parameter) + 1.0
        states[weight.parameter] = {"exp_avg": torch.ones_like(weight.parameter)}
    assert observe(model.weights, 1.0)
    before = [weight.mask for weight in model.weights]
    churn = model.update(0.25, 0.5, [states], update=0)
    grown = [weight.mask & ~old for weight, old in zip(model.weights, before, strict=True)]
    assert churn == sum(int(new.sum()) for new in grown) / 40
    assert [int(new.sum()) for new in grown] == [4, 16]
    assert (model.density, model.explored) == (0.25, 100 / 160)
    for weight, old in zip(model.weights, before, strict=True):
        changed = old ^ weight.mask
        assert torch.count_nonzero(weight.weight[~weight.mask | changed]) == 0
        assert torch.count_nonzero(weight.parameter.grad[~weight.mask]) == 0
        assert torch.equal(states[weight.parameter]["exp_avg"] == 0, changed)


def test_states_are_cleared_at_the_inactive_units_of_all_layers_or_the_given_ones():
    model = small_model()
    states = {weight.parameter: {"exp_avg": torch.ones_like(weight.parameter)} for weight in model.weights}
    first, second = model.weights
    first.clear_optimizer_state_(states, torch.ones_like(first.mask))
    assert not states[first.parameter]["exp_avg"].any()
    assert states[second.parameter]["exp_avg"].all()
    model.clear_optimizer_states_(model.weights, [states])
    assert torch.equal(states[second.parameter]["exp_avg"].bool(), second.mask)


def test_nan_weights_are_refused_with_the_layers_name():
    model = small_model()
    model.refuse_nan()
    model.weights[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the run has diverged: layer '1' holds NaN weights"):
        model.refuse_nan()


@pytest.mark.parametrize("inactive", ["zero", "frozen"])
def test_a_copy_is_masked_where_inactive_weights_are_zero_in_the_forward(inactive):
    model = small_model(inactive)
    copied = nn.ModuleDict({str(i): nn.Linear(n, m) for i, (m, n) in enumerate([(8, 4), (16, 8), (2, 2)])})
    for module in copied.values():
        nn.init.ones_(module.weight)
    model.mask_copy_(copied)
    for weight in model.weights:
        expected = torch.ones_like(weight.mask) if inactive == "frozen" else weight.mask
        assert torch.equal(copied[weight.name].weight.bool(), expected)
    assert copied["2"].weight.all()
    if inactive == "zero":
        for other, found in ((nn.Linear(2, 2), "no such layer"), (nn.ModuleList([nn.Linear(4, 9)]), "shape (9, 4)")):
            with pytest.raises(ValueError, match=rf"with a layer '0' of shape \(8, 4\), got .*{re.escape(found)}"):
                model.mask_copy_(other)
