"""Optimizers that are made in mid-run: met at their first step, and treated as those that were given."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from helpers.runs import differences
from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase, Units
from lightning_estdgm.engine._optimizer_trial import trial_optimizer

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 15), Phase(0.3, 0.3, 15), Phase(0.2, 0.1, 30), update_every=5, observe_steps=2, freeze=0.5
)
CONFIG = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")
STEPS = 60
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def run(make: Callable[[nn.Module], Optimizer], change: Callable[[DGMController, nn.Module, Optimizer], Any]) -> Any:
    """Train; before step 23 `change` returns the optimizer that goes on. Return the model and the controller."""
    net = model()
    optimizer = make(net)
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS) as dgm:
        for step in range(STEPS):
            if step == 23:
                optimizer = change(dgm, net, optimizer)
            optimizer.zero_grad()
            net(X).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            outside = sum(int(net.get_submodule(n).weight[~m].count_nonzero()) for n, m in dgm.masks().items())
            assert outside == 0 or step == 0
            dgm.advance()
    return net, dgm


def adam(net: nn.Module) -> Optimizer:
    return torch.optim.AdamW(net.parameters(), 1e-2)


def cleared(dgm: DGMController, net: nn.Module, optimizer: Optimizer) -> Optimizer:
    optimizer.state.clear()
    return optimizer


NEW: dict[str, Callable[[DGMController, nn.Module, Optimizer], Optimizer]] = {
    "made anew": lambda dgm, net, _: adam(net),
    "copied": lambda dgm, net, optimizer: _cleared_copy(optimizer, net),
    "told": lambda dgm, net, _: _told(dgm, adam(net)),
}


def _cleared_copy(optimizer: Optimizer, net: nn.Module) -> Optimizer:
    twin = adam(net)
    state = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(state)
    twin.state.clear()
    return twin


def _told(dgm: DGMController, optimizer: Optimizer) -> Optimizer:
    dgm.use_optimizers(optimizer)
    return optimizer


@pytest.mark.parametrize("how", NEW)
def test_a_new_optimizer_goes_on_as_one_whose_state_was_cleared(how: str) -> None:
    net, dgm = run(adam, NEW[how])
    expected, plain = run(adam, cleared)
    assert dgm.steps == dgm.position == STEPS
    assert dgm.density == dgm.final_density
    assert differences(net.state_dict(), expected.state_dict()) == []
    assert differences(dgm.masks(), plain.masks()) == []
    assert [d.why for d in dgm.decisions()] == [d.why for d in plain.decisions()]


def test_a_new_optimizer_of_another_class_resets_its_own_state_and_scales_its_steps() -> None:
    before_all = set(_global_optimizer_pre_hooks)  # of controllers that other tests have left open
    _, dgm = run(adam, lambda dgm, net, _: torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9))
    assert dgm.density == dgm.final_density
    control = model()
    optimizer = torch.optim.SGD(control.parameters(), 0.1)
    with DGMController(control, torch.optim.SGD(control.parameters(), 0.1), CONFIG, total_steps=STEPS) as dgm:
        control(X).square().mean().backward()
        optimizer.step()  # not the one that was given
        assert dgm.advance()
        before = control[0].weight.detach().clone()
        optimizer.zero_grad()
        control(X).square().mean().backward()
        dgm.mask_gradients()
        gradient, density = control[0].weight.grad.clone(), dgm.layer_densities()["0"]
        optimizer.step()
        torch.testing.assert_close(control[0].weight, before - 0.1 / density * gradient)
    assert set(_global_optimizer_pre_hooks) <= before_all
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_new_optimizer_at_each_step_costs_no_more_with_time() -> None:
    net, met = model(), []
    with DGMController(net, torch.optim.SGD(net.parameters(), 1e-2), CONFIG, total_steps=STEPS) as dgm:
        for _ in range(STEPS):  # as by Reptile, whose inner loop trains the model itself
            optimizer = adam(net)
            met.append(weakref.ref(optimizer))
            net(X).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
            assert (
                all(not net.get_submodule(n).weight[~m].count_nonzero() for n, m in dgm.masks().items())
                or not dgm.steps
            )
            dgm.advance()
            held = sum(ref() is not None for ref in met)
            assert held <= 5
            assert len(dgm._states._rules[id(net[0].weight)]) <= 5 * len(optimizer.state[net[0].weight])
        assert dgm.steps == STEPS
        assert dgm.density == dgm.final_density


def test_a_new_optimizer_is_tried_only_if_its_settings_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Optimizer] = []

    def counted(optimizer: Optimizer, *args: Any) -> Optimizer:
        tried.append(optimizer)
        return trial_optimizer(optimizer, *args)

    for module in ("_state_trial", "_rate_trial", "_count_trial"):
        monkeypatch.setattr(f"lightning_estdgm.engine.{module}.trial_optimizer", counted)
    net = model()
    with DGMController(net, torch.optim.SGD(net.parameters(), 1e-2), CONFIG, total_steps=STEPS) as dgm:
        for step, betas in enumerate([(0.9, 0.987), (0.9, 0.987), (0.9, 0.986), (0.9, 0.987)]):
            tried.clear()
            optimizer = torch.optim.Adam(net.parameters(), 10.0 ** -(2 + step), betas=betas)
            net(X).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
            dgm.advance()
            assert bool(tried) == (step in (0, 2))
            assert all(one is optimizer for one in tried)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_many_optimizers_that_take_turns_are_all_kept_in_line(storage: str) -> None:
    net = model()
    config = DGMConfig(SCHEDULE, units=Units(size=1), storage=storage)
    given = torch.optim.SGD(net.parameters(), 0.1)
    many: list[Optimizer] = []
    with DGMController(net, given, config, total_steps=STEPS, audit=False) as dgm:
        for step in range(STEPS):
            if step < 9:
                many.append(torch.optim.Adam(net.parameters(), 1e-2))
            optimizer = many[step % len(many)]
            optimizer.zero_grad()
            net(X).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            for one in many if storage == "dense" else ():
                for name, mask in dgm.masks().items():
                    state = one.state.get(net.get_submodule(name).weight)
                    assert not state or not state["exp_avg"][~mask].any()
        assert dgm.steps == STEPS
        assert dgm._met == many
        assert dgm.density == dgm.final_density


def test_optimizers_of_other_models_are_left_alone() -> None:
    net, other = model(), model()
    stranger = adam(other)
    with DGMController(net, adam(net), CONFIG, total_steps=STEPS) as dgm:
        other(X).square().mean().backward()
        stranger.step()
        assert not dgm.advance()
        assert not stranger._optimizer_step_pre_hooks
        assert dgm.steps == 0


class Unseen:
    """Has what loops use of an optimizer, and runs none of torch's hooks."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.state: dict[Any, Any] = {}

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad


def test_steps_that_cannot_be_seen_are_said_also_in_mid_run() -> None:
    net = model()
    optimizer: Any = adam(net)
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS) as dgm:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(56):
                if step == 5:
                    optimizer = Unseen(net.parameters())
                optimizer.zero_grad()
                net(X).square().mean().backward()
                dgm.mask_gradients()
                optimizer.step()
                if step < 55:
                    dgm.advance()
        with pytest.warns(RuntimeWarning, match="none of their optimizer's steps was seen.*the schedule stands still"):
            dgm.advance()
        assert dgm.steps == 5
        with pytest.raises(ValueError, match=r"cannot be seen: Unseen runs no step hooks"):
            dgm.use_optimizers(optimizer)
