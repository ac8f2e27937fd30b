"""Observation windows: when gradients are summed, which ones, and what is left out."""

import pytest
import torch

from helpers.controller_runs import SCHEDULE, STEPS, WEIGHTS, adamw, batch, equal, fit, loss_of, sgd
from helpers.masked_weights import numbered
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._observation import Window, observe


def test_buffers_exist_only_inside_a_window(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            window = dgm.state_dict()["layers"]["0"]["window"]
            seen = sum(dgm.schedule(s).observe for s in (step - 1, step)) if dgm.schedule(step).observe else 0
            inside = seen and not dgm.schedule(step + 1).update
            assert (window["samples"] if window else 0) == (seen if inside else 0)


def test_the_first_call_in_a_step_is_the_one_observed(mlp):
    def final(calls):
        model = mlp(32, 64, 4)
        optimizer = sgd(model)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                for _ in range(calls):
                    dgm.mask_gradients()
                optimizer.step()
                dgm.advance()
        return model

    assert equal(final(1), final(3))
    assert equal(final(1), final(0))  # none: the hook before the step observes and masks


def test_a_gradient_scale_is_taken_out(mlp):
    def final(scales, told):
        model = mlp(32, 64, 4)
        optimizer = sgd(model)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
            for step in range(STEPS):
                scale = scales[step % 2]
                optimizer.zero_grad()
                (scale * loss_of(model, batch(step, 32))).backward()
                dgm.mask_gradients(grad_scale=scale if told else 1.0)
                for p in model.parameters():
                    p.grad.div_(scale)
                optimizer.step()
                dgm.advance()
        return model

    plain = final((1.0, 1.0), told=True)
    assert equal(plain, final((2.0**10, 2.0**-3), told=True))
    assert not equal(plain, final((2.0**10, 2.0**-3), told=False))


def fit_with_bad_gradients(mlp, bad_steps, value=float("nan")):
    """Train with a gradient that is not finite at some steps; the loop itself leaves out those updates."""
    model = mlp(32, 64, 64, 4)
    optimizer = sgd(model)
    updated = []
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            if step in bad_steps:
                model[2].weight.grad[0, 0] = value
            dgm.mask_gradients()
            for p in model.parameters() if step in bad_steps else ():
                p.grad.zero_()
            optimizer.step()
            if dgm.advance():
                updated.append(step + 1)
    return model, dgm, updated


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_and_said_once(mlp, value):
    plain, _, updates = fit_with_bad_gradients(mlp, ())
    window = [step for step in range(STEPS) if SCHEDULE.resolve(STEPS)(step).observe]
    assert updates[0] - window[0] == 2
    with pytest.warns(RuntimeWarning, match=f"step {window[0]}: a gradient was NaN or infinite") as said:
        model, _, found = fit_with_bad_gradients(mlp, (window[0], window[2]), value)
    assert len(said) == 1
    assert found == updates
    assert all(p.isfinite().all() for p in model.parameters())
    assert not equal(model, plain)


def test_an_update_waits_until_something_could_be_observed(mlp):
    _, _, updates = fit_with_bad_gradients(mlp, ())
    at = updates[0]
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        model, dgm, late = fit_with_bad_gradients(mlp, (at - 2, at - 1, at))
    # The first sample after the due step is the one of step at + 1.
    assert late == [at + 2, *updates[1:]]
    assert dgm.density == pytest.approx(0.10, abs=1e-3)
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ windows by themselves


def with_gradient(value, **settings):
    weight = numbered([[1, 0], [0, 1]], **settings)
    weight.parameter.grad = torch.full_like(weight.parameter, value)
    return weight


def test_gradients_of_several_steps_are_summed_with_the_norms_of_their_units():
    weight = with_gradient(3.0, block_size=2)
    for sign in (1.0, -1.0, -1.0):
        weight.begin_step()
        weight.parameter.grad.abs_().mul_(sign)
        assert observe([weight], 0.5)
    assert weight.window.samples == 3
    assert torch.equal(weight.window.gradient, torch.full((4, 4), -1.5))
    assert torch.equal(weight.window.norm, torch.full((2, 2), 9.0))  # of blocks of four: twice the magnitude


def test_a_step_is_observed_once():
    weight = with_gradient(1.0)
    for _ in range(2):
        assert observe([weight], 1.0)
    assert (weight.window.samples, weight.observed) == (1, True)
    weight.begin_step()
    assert observe([weight], 1.0)
    assert weight.window.samples == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_that_is_not_finite_keeps_all_of_the_step_out(value):
    weights = [with_gradient(1.0), with_gradient(value)]
    assert not observe(weights, 1.0)
    assert [weight.window for weight in weights] == [None, None]
    assert not any(weight.observed for weight in weights)
    assert observe(weights[:1], 1.0)
    assert weights[0].window is None  # the step is over for it, too


def test_a_weight_without_gradient_opens_no_window():
    weight, without = with_gradient(1.0), numbered([[1, 0]])
    assert observe([weight, without], 1.0)
    assert weight.observed
    assert not without.observed
    assert without.window is None


def test_sums_of_half_precision_are_kept_in_single():
    window = Window(torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bool))
    assert {window.gradient.dtype, window.norm.dtype} == {torch.float32}


def test_a_window_of_another_rank_cannot_be_loaded():
    weight = with_gradient(1.0)
    observe([weight], 1.0)
    state = weight.window.state_dict(weight.placement)
    weight.window.load_state_dict(state, weight)
    with pytest.raises(ValueError, match="layer '0': the state of an open observation window is whole on rank 0 only"):
        weight.window.load_state_dict(state | {"gradient": None}, weight)
