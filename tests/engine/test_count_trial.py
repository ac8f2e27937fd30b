"""Trial of an optimizer: whether units that begin anew need a count of steps of their own, and for how long."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.counting_optimizers import CountedAverage
from helpers.default_device import set_default_device
from lightning_estdgm.engine import _count_trial
from lightning_estdgm.engine._count_trial import SETTLED, UnitCounts, unit_counts


def counts(make, dtype=torch.float32, side=16):
    parameter = nn.Parameter(torch.ones(side, side, dtype=dtype))
    return unit_counts(make([parameter]), 0, parameter)


def adam_lifetime(b1, b2):
    ratios = [math.sqrt(1 - b2**n) / (1 - b1**n) for n in range(1, 20_000)]
    return max(n for n, ratio in enumerate(ratios, 1) if abs(ratio - 1) > SETTLED * ratio)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99)])
def test_adam_needs_them_until_its_corrections_are_over(betas):
    found = counts(lambda p: torch.optim.AdamW(p, 0.0, betas=betas, eps=0.0), torch.float64)
    assert found == UnitCounts(adam_lifetime(*betas), own_state=False)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="AdamW of torch 2.6 itself cannot step with this default device")
def test_another_default_device_of_torch_changes_nothing():
    def adam(parameters):
        return torch.optim.AdamW(parameters, betas=(0.9, 0.91))  # which no other test has tried

    parameter = nn.Parameter(torch.ones(16, 16))
    optimizer = adam([parameter])
    set_default_device("meta")
    try:
        found = unit_counts(optimizer, 0, parameter)
    finally:
        set_default_device(None)
    assert (found.lifetime > 0, found.why_not) == (True, "")


NEEDED = {
    "Adam, fused": lambda p: torch.optim.Adam(p, 1e-3, betas=(0.9, 0.99), fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 1e-3, betas=(0.9, 0.99), foreach=True, weight_decay=0.1),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), betas=(0.9, 0.99), amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-3, betas=(0.9, 0.99)),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3, betas=(0.9, 0.99)),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3, betas=(0.9, 0.99)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", NEEDED.values(), ids=NEEDED)
def test_optimizers_that_correct_by_their_count_need_them(make, dtype):
    found = counts(make, dtype)
    assert 20 < found.lifetime < 1_500
    assert found.why_not == ""
    assert not found.own_state


def test_state_that_a_count_changes_is_of_their_own():
    found = counts(CountedAverage)
    assert 20 < found.lifetime < 1_500
    assert found.own_state


class Configured(torch.optim.Adam):
    """Takes its betas from a setting of its own, kept as `keep` makes it."""

    def __init__(self, params, b2, keep):
        super().__init__(params, 1e-3)
        self.config = keep(b2)

    def step(self, closure=None):
        kept = self.config
        b2 = kept["b2"] if isinstance(kept, dict) else kept.b2 if isinstance(kept, SimpleNamespace) else kept[0]
        self.param_groups[0]["betas"] = 0.9, float(b2)
        return super().step(closure)


@pytest.mark.parametrize(
    "keep",
    [lambda b2: {"b2": b2}, lambda b2: [b2], lambda b2: SimpleNamespace(b2=b2), lambda b2: (torch.tensor(b2),)],
    ids=["dict", "list", "object", "tensor"],
)
def test_settings_of_every_kind_count(keep):
    short, long = (counts(lambda p, b2=b2: Configured(p, b2, keep)) for b2 in (0.95, 0.999))
    assert (short.lifetime, long.lifetime) == (
        pytest.approx(adam_lifetime(0.9, 0.95), abs=1),
        pytest.approx(adam_lifetime(0.9, 0.999), abs=1),
    )


@pytest.mark.parametrize("keep", [lambda b2: {"b2": b2}, lambda b2: SimpleNamespace(b2=b2)], ids=["dict", "object"])
def test_an_optimizer_is_tried_once(keep, monkeypatch):
    parameter = nn.Parameter(torch.ones(16, 16))
    optimizer = Configured([parameter], 0.93, keep)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    found = unit_counts(optimizer, 0, parameter)
    monkeypatch.setattr(_count_trial, "_tried", None)
    optimizer.param_groups[0]["lr"] = 0.5
    assert unit_counts(optimizer, 0, parameter) == found


NOT_NEEDED = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 1e-3),
}


class MadeAtOnce(torch.optim.SGD):
    """Makes its state in ``__init__`` alone, as Adagrad of torch 2.6; its count changes nothing."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["k"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["k"] += 1
                p.sub_(p.grad, alpha=group["lr"])


NOT_NEEDED["MadeAtOnce"] = MadeAtOnce


@pytest.mark.parametrize("make", NOT_NEEDED.values(), ids=NOT_NEEDED)
def test_optimizers_whose_count_changes_nothing_do_not(make):
    assert counts(make) == UnitCounts()


class CountInGroup(torch.optim.SGD):
    """Corrects a momentum by a count that its group keeps."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(m.lerp_(p.grad, 0.01) / (1 - 0.99 ** group["k"]), alpha=group["lr"])


class NormOfAll(torch.optim.Adam):
    """Divides gradients by the norm of them all."""

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
        for gradient in gradients:
            gradient.copy_(torch.sign(gradient) * norm)
        return super().step(closure)


class Eager(torch.optim.Adam):
    """Makes its state when it is made."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.tensor(0.0), **{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}}

    def step(self, closure=None):
        if any(p not in self.state for group in self.param_groups for p in group["params"]):
            raise KeyError("a parameter without state")
        return super().step(closure)


class Codes(torch.optim.SGD):
    """Corrects a momentum, which it keeps in 8 bits if the parameter is large."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                step = state["step"] = state.get("step", 0) + 1
                m = state["m"].float() * state.get("largest", 1.0) if "m" in state else torch.zeros_like(p)
                m.lerp_(p.grad, 0.01)
                p.sub_(m / (1 - 0.99**step), alpha=group["lr"])
                state["m"] = m
                if p.numel() >= 4_096:
                    state["largest"] = m.abs().max() / 127
                    state["m"] = (m / state["largest"]).round().to(torch.int8)


NOT_BY_UNIT = {
    "Adafactor": (torch.optim.Adafactor, "a step of Adafactor is made of the whole weight"),
    "CountInGroup": (CountInGroup, "CountInGroup keeps it outside a parameter's state, or mixes parameters"),
    "NormOfAll": (NormOfAll, "NormOfAll keeps it outside a parameter's state, or mixes parameters"),
    "Eager": (Eager, "Eager could not be tried (KeyError: 'a parameter without state')"),
}
if not torch.optim.Adagrad([torch.ones(1)]).state:  # that of torch 2.6 is as Eager
    NOT_BY_UNIT["a schedule"] = (lambda p: torch.optim.Adagrad(p, 1e-3, lr_decay=0.01), "Adagrad has a schedule by it")
if hasattr(torch.optim, "Muon"):
    NOT_BY_UNIT["Muon"] = (torch.optim.Muon, "a step of Muon is made of the whole weight")


@pytest.mark.parametrize(("make", "why"), NOT_BY_UNIT.values(), ids=NOT_BY_UNIT)
def test_where_units_cannot_have_them_the_reason_is_said(make, why):
    assert counts(lambda p: make(p)) == UnitCounts(0, why)


def test_state_that_is_quantised_for_large_weights_is_found_at_their_size():
    assert counts(Codes).lifetime > 500
    assert counts(Codes, side=64) == UnitCounts(0, "Codes does not keep its state element by element")


def test_a_trial_leaves_the_optimizer_and_the_random_numbers_of_the_run():
    parameter = nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.AdamW([parameter], 1e-3, betas=(0.9, 0.91))
    parameter.grad = torch.ones(8, 8)
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), parameter.detach(), torch.get_rng_state()))
    assert unit_counts(optimizer, 0, parameter).lifetime
    after = (optimizer.state_dict(), parameter.detach(), torch.get_rng_state())
    assert str(before[0]) == str(after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
