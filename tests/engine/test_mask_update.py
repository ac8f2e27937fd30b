"""Mask updates: which units stay and which are grown."""

import pytest
import torch
from torch import nn

from helpers.controller_runs import STEPS, WEIGHTS, adamw, fit
from helpers.masked_weights import numbered
from helpers.published_runs import DENSITY, EVERY, count, trained
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._mask_update import update_masks
from lightning_estdgm.engine._observation import observe
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.presets import preset


class Branches(nn.Module):
    """A network of which one layer gets no gradient."""

    def __init__(self, mlp):
        super().__init__()
        self.used = mlp(32, 64, 64)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.used(x))


def test_a_layer_without_gradient_follows_the_budget_and_grows_nothing(mlp):
    torch.manual_seed(0)
    model = Branches(mlp)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        start = model.unused.weight.detach().clone()
        before = dgm.masks()["unused"]
        for _ in fit(model, optimizer, dgm):
            after = dgm.masks()["unused"]
            assert not (after & ~before).any()
            before = after
            assert torch.equal(model.unused.weight, start * after)
        assert dgm.density == pytest.approx(0.10, abs=1e-4)
        dropped = start[~after & (start != 0)].abs()
        assert dropped.max() <= start[after].abs().min()


def test_growth_at_random_observes_nothing_by_single_weights(mlp):
    schedule = EstDgm(update_every=EVERY, observe_steps=2)
    for block_size, observed in ((1, 0), (16, 2)):
        config = DGMConfig(
            schedule,
            units=Units(size=block_size),
            update_rule=UpdateRule(grow="random"),
            backend="dense",
            step_size=StepSize(exponent=0.0),
        )
        updates, _, _ = trained(mlp, config, widths=(64, 96, 64, 4))
        assert {len(seen.gradients) for layers in updates.values() for seen in layers.values()} == {observed}


def test_random_growth_is_fixed_by_the_seed_alone(mlp):
    def masks_of(config):
        return trained(mlp, config, 24)[1]

    torch.manual_seed(1)
    first = masks_of(preset("set", DENSITY, update_every=EVERY))
    torch.manual_seed(2)
    again = masks_of(preset("set", DENSITY, update_every=EVERY))
    other = masks_of(preset("set", DENSITY, update_every=EVERY, seed=1))
    assert all((a[name] == b[name]).all() for a, b in zip(first, again, strict=True) for name in a)
    assert any((first[-1][name] != other[-1][name]).any() for name in first[-1])


def test_layers_of_one_shape_grow_by_chances_of_their_own(mlp):
    updates, _, _ = trained(mlp, preset("set", DENSITY, update_every=EVERY), 32, (16, 16, 16, 4))
    shared = grown = 0
    for layers in updates.values():
        first, second = (seen.new_mask & ~seen.mask for seen in layers.values())
        shared, grown = shared + count(first & second), grown + count(first)
    assert grown > 60
    assert shared < grown / 3


# ------------------------------------------------------------------ one weight by itself


def observed_weight(gradient):
    """Return 1 to 8, of which 1, 3, 5 and 7 are active, with one gradient observed."""
    weight = numbered([[1, 0, 1, 0], [1, 0, 1, 0]])
    weight.inactive.apply_mask_(weight)
    weight.parameter.grad = torch.tensor(gradient).view(2, 4)
    assert observe([weight], 1.0)
    return weight


def updated(weight, k, drop_fraction, **rule):
    """Return what one update has changed, in units of the flat mask, and how many it says were grown."""
    rule = UpdateRule(**{"keep": "magnitude", "grow": "gradient"} | rule)
    ((same, changed, grown),) = update_masks([weight], [[k]], drop_fraction, rule, seed=0)
    assert same is weight
    return weight.mask.flatten().nonzero().flatten().tolist(), changed.flatten().nonzero().flatten().tolist(), grown


@pytest.mark.parametrize(
    ("k", "drop_fraction", "mask", "changed", "grown"),
    [
        (4, 0.0, [0, 2, 4, 6], [], 0),
        (4, 0.5, [1, 4, 5, 6], [0, 1, 2, 5], 2),
        (2, 0.0, [4, 6], [0, 2], 0),
        (6, 0.0, [0, 1, 2, 4, 5, 6], [1, 5], 2),
    ],
)
def test_the_smallest_weights_go_and_the_largest_gradients_come(k, drop_fraction, mask, changed, grown):
    weight = observed_weight([9.0, 4.0, 9.0, 1.0, 9.0, -3.0, 9.0, 2.0])
    assert updated(weight, k, drop_fraction) == (mask, changed, grown)
    assert weight.active == k
    assert weight.window is None
    assert weight.explored.flatten().nonzero().flatten().tolist() == sorted({0, 2, 4, 6, *mask})


def test_what_was_just_dropped_comes_back_only_with_regrow():
    gradient = [9.0, 4.0, 8.0, 1.0, 9.0, -3.0, 9.0, 2.0]
    assert updated(observed_weight(gradient), 4, 0.5)[0] == [1, 4, 5, 6]
    assert updated(observed_weight(gradient), 4, 0.5, regrow=True) == ([0, 2, 4, 6], [], 0)


def test_random_growth_depends_on_seed_and_update():
    def grown(seed, update):
        weight = numbered([[1] + [0] * 31] * 4)
        rule = UpdateRule(keep="magnitude", grow="random")
        list(update_masks([weight], [[32]], 0.0, rule, seed=seed, update=update))
        return weight.mask

    assert torch.equal(grown(0, 0), grown(0, 0))
    assert not torch.equal(grown(0, 0), grown(1, 0))
    assert not torch.equal(grown(0, 0), grown(0, 1))


def test_nan_weights_end_the_run_with_the_layers_name():
    weight = observed_weight([1.0] * 8)
    weight.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the run has diverged: layer '0' holds NaN weights at a mask update"):
        updated(weight, 4, 0.5)
