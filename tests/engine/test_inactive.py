"""Inactive weights: zero, frozen, or learning outside the forward."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from helpers.controller_runs import SCHEDULE, STEPS, batch, full_masks, loss_of
from helpers.masked_weights import numbered
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.presets import preset


@pytest.mark.parametrize("block_size", [1, 16])
def test_frozen_keeps_inactive_weights_bitwise_and_never_scales(mlp, block_size):
    config = DGMConfig(SCHEDULE, units=Units(size=block_size), inactive="frozen")
    model = mlp(32, 128, 64, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    start = copy.deepcopy(model.state_dict())
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
        for step in range(STEPS):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            masks = full_masks(dgm)
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            raw = {name: model.get_submodule(name).weight.grad.clone() for name in masks}
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            for name, mask in masks.items():
                old = before[f"{name}.weight"]
                expected = torch.where(mask, old - 0.1 * (raw[name] + 0.1 * old), old)
                torch.testing.assert_close(model.get_submodule(name).weight, expected)
                assert torch.equal(model.get_submodule(name).weight[~mask], old[~mask])
                assert (~mask).any()
        assert dgm.density < 0.2


def test_steps_of_weights_outside_the_forward_are_scaled_like_the_others(mlp):
    def after_one_step(exponent):
        config = preset(
            "top-kast", 0.25, penalty=0.0, backward_density=1.0, units={"size": 16}, step_size={"exponent": exponent}
        )
        model = mlp(32, 64, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with DGMController(model, optimizer, replace(config, backend="cpu"), total_steps=8, audit=False) as dgm:
            (layer,) = dgm.masked_weights
            before = model[0].weight.detach() + layer.inactive.shadow.weights
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
            F.mse_loss(model(x), x[:, :4]).backward()
            gradient = model[0].weight.grad.clone()
            optimizer.step()
            return before, gradient, model[0].weight.detach() + layer.inactive.shadow.weights

    for exponent, factor in ((0.0, 1.0), (1.0, 4.0)):
        before, gradient, after = after_one_step(exponent)
        assert torch.count_nonzero(gradient) == gradient.numel()
        torch.testing.assert_close(after, before - 0.1 * factor * gradient)


def test_a_scaler_that_skips_and_scales_changes_nothing(mlp):
    """With a fused optimizer, which steps by scaled gradients and is called for infinite ones, too."""

    def weights(scaler, infinite_at=()):
        model = mlp(12, 24, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        data = torch.Generator().manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100, backoff_factor=0.5, enabled=scaler)
        config = preset("top-kast", 0.2, update_every=4, penalty=0.05)
        with DGMController(model, optimizer, config, total_steps=100, audit=False) as dgm:
            for step in range(12 + len(infinite_at)):
                infinite = step in infinite_at
                x = torch.full((8, 12), torch.inf) if infinite else torch.randn(8, 12, generator=data)
                optimizer.zero_grad()
                loss = model(x).square().mean()
                scaler.scale(loss).backward()
                if infinite:
                    model[0].weight.grad.fill_(torch.inf)
                dgm.mask_gradients(grad_scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                dgm.advance()
                mask = dgm.masks()["0"]
                assert torch.count_nonzero(model[0].weight[~mask]) == 0
        return [p.detach().clone() for p in model.parameters()]

    plain = weights(scaler=False)
    for a, b, c in zip(plain, weights(scaler=True), weights(scaler=True, infinite_at=(3, 6)), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_step_without_a_gradient_leaves_the_shadow_weights_where_they_are(mlp):
    model = mlp(12, 24, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    with DGMController(model, optimizer, preset("top-kast", 0.2), total_steps=8, audit=False) as dgm:
        (layer,) = dgm.masked_weights
        weight, held = model[0].weight.detach().clone(), layer.inactive.shadow.weights.clone()
        optimizer.step()
        optimizer.step(lambda: None)
        assert torch.equal(model[0].weight, weight)
        assert torch.equal(layer.inactive.shadow.weights, held)


# ------------------------------------------------------------------ one step of one small weight

MASK = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]  # of 1 to 16: active are 1, 12 and 16
LEARNING = BackwardSet(density=0.5, active_decay=0.5, shadow_decay=2.0)
MODES = {"zero": "zero", "frozen": "frozen", "learning": LEARNING}


def stepped(inactive, exponent=1.0, grad_scale=1.0):
    """Return a weight after a step that adds 1 to all that the optimizer sees, and what it was before."""
    weight = numbered(MASK, inactive=inactive)
    before = weight.weight.clone()
    weight.inactive.apply_mask_(weight)
    weight.parameter.grad = torch.ones(4, 4)
    weight.inactive.mask_gradient_(weight, weight.gradient)
    weight.inactive.before_step(weight, exponent)
    weight.inactive.with_gradients(weight, exponent, grad_scale)
    weight.weight.add_(1.0)
    weight.inactive.after_step(weight, exponent)
    return weight, before


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_zero_scales_the_step_of_active_weights_and_zeros_the_others(exponent):
    weight, before = stepped("zero", exponent)
    torch.testing.assert_close(weight.weight, (before + (16 / 3) ** exponent) * weight.mask)
    assert weight.gradient.tolist() == weight.mask.float().tolist()
    assert weight.inactive.step_scale(weight, exponent) == pytest.approx((16 / 3) ** exponent)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_frozen_steps_active_weights_unscaled_and_gives_the_others_their_value(exponent):
    weight, before = stepped("frozen", exponent)
    assert torch.equal(weight.weight, before + weight.mask.float())
    assert weight.gradient.tolist() == weight.mask.float().tolist()
    assert weight.inactive.step_scale(weight, exponent) == 1.0


@pytest.mark.parametrize("grad_scale", [1.0, 8.0])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_learning_steps_the_largest_outside_the_forward_and_penalizes_them(exponent, grad_scale):
    weight, before = stepped(LEARNING, exponent, grad_scale)
    largest = before > 9  # with the active 1, half of the 16
    learning = largest | weight.mask
    assert torch.equal(weight.inactive.shadow.learning, learning)
    torch.testing.assert_close(weight.weight, (before + (16 / 3) ** exponent) * weight.mask)
    moved = before + (16 / 3) ** exponent * learning
    torch.testing.assert_close(weight.inactive.shadow.weights, moved * ~weight.mask)
    penalty = torch.where(weight.mask, 0.5, 2.0) * before
    assert torch.equal(weight.gradient, (1.0 + penalty * grad_scale) * learning)


@pytest.mark.parametrize("inactive", MODES.values(), ids=MODES)
def test_a_step_that_was_not_made_leaves_all_as_it_was(inactive):
    weight = numbered(MASK, inactive=inactive)
    weight.inactive.apply_mask_(weight)
    before, shadow = weight.weight.clone(), copy.deepcopy(weight.inactive.state_dict())
    weight.parameter.grad = torch.ones(4, 4)
    weight.inactive.before_step(weight, 1.0)
    weight.inactive.with_gradients(weight, 1.0, 1.0)
    weight.inactive.withdraw(weight)
    assert torch.equal(weight.weight, before)
    assert str(weight.inactive.state_dict()) == str(shadow)


@pytest.mark.parametrize(
    ("name", "in_forward", "judged", "share"), [("zero", 0, 0, 3), ("frozen", 1, 1, 3), ("learning", 0, 1, 8)]
)
def test_what_acts_in_the_forward_and_what_an_update_judges(name, in_forward, judged, share):
    weight = numbered(MASK, inactive=MODES[name])
    everything = weight.weight.clone()
    weight.inactive.apply_mask_(weight)
    assert torch.equal(weight.weight, everything if in_forward else everything * weight.mask)
    assert weight.inactive.act_in_forward == bool(in_forward)
    assert weight.inactive.learning_density(weight) == share / 16
    assert weight.inactive.learn == (name == "learning")
    weight.inactive.before_update(weight)
    assert torch.equal(weight.weight, everything if judged else everything * weight.mask)


@pytest.mark.parametrize("theirs", MODES)
@pytest.mark.parametrize("ours", MODES)
def test_a_state_with_shadow_weights_goes_to_a_weight_that_has_them_only(ours, theirs):
    state = numbered(MASK, inactive=MODES[theirs])
    state.inactive.apply_mask_(state)
    weight = numbered(MASK, inactive=MODES[ours])
    saved = state.inactive.state_dict()
    if (ours == "learning") == (theirs == "learning"):
        weight.inactive.load_state_dict(saved, weight.name)
        assert str(weight.inactive.state_dict()) == str(saved)
    else:
        found = "none" if ours == "learning" else "some"
        with pytest.raises(ValueError, match=f"layer '0': the checkpoint holds {found} of the weights"):
            weight.inactive.load_state_dict(saved, weight.name)
