"""Layers that begin to train after the first steps are audited and masked at the next mask update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers.runs import differences
from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase, Selection, Units

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 15), Phase(0.3, 0.3, 15), Phase(0.2, 0.1, 30), update_every=5, observe_steps=2, freeze=0.5
)
CONFIG = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")
STEPS, THAWED = 60, 22
X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A backbone, a neck that is used from `THAWED` on, a part that is never trained, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.neck, self.top = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.target, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
        self.necked = range(THAWED, STEPS)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        h = self.backbone(x)
        return self.head(self.top(self.neck(h) if step in self.necked else h))


def frozen(net: Net, step: int, optimizer: Any) -> None:
    net.backbone.requires_grad_(step >= THAWED)


def held_later(net: Net, step: int, optimizer: Any) -> None:
    if step == 0:
        kept = {id(p) for p in net.backbone.parameters()}
        optimizer.param_groups[0]["params"] = [
            p for p in optimizer.param_groups[0]["params"] if id(p) not in kept and p is not None
        ]
    if step == THAWED:
        optimizer.add_param_group({"params": list(net.backbone.parameters()), "lr": 1e-3})


def once(net: Net, step: int, optimizer: Any) -> None:
    net.necked = range(23, 24)


class Run:
    """Steps of a plain loop, which can be saved and gone on with."""

    def __init__(self, how: Callable[[Net, int, Any], None], config: DGMConfig = CONFIG, saved: Any = None) -> None:
        self.net, self.how, self.first = Net(), how, 0
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        how(self.net, 0, self.optimizer)
        if saved:
            if saved["step"] > THAWED:
                how(self.net, THAWED, self.optimizer)
            self.first = saved["step"]
            self.net.load_state_dict(saved["net"])
            self.optimizer.load_state_dict(saved["optimizer"])
        self.dgm = DGMController(self.net, self.optimizer, config, total_steps=STEPS, state=saved and saved["dgm"])

    def go(self, steps: int = STEPS) -> Run:
        for step in range(self.first, steps):
            self.how(self.net, step, self.optimizer)
            self.optimizer.zero_grad()
            self.net(X, step).square().mean().backward()
            self.dgm.mask_gradients()
            self.optimizer.step()
            for name, mask in self.dgm.masks().items():
                if self.dgm.steps:
                    assert not self.net.get_submodule(name).weight[~mask].count_nonzero(), (step, name)
            with torch.no_grad():
                self.net.target.weight.mul_(0.99)  # as an average would be
            self.dgm.advance()
        self.first = steps
        return self

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "step": self.first,
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "dgm": self.dgm.state_dict(),
            }
        )

    def end(self) -> dict[str, Any]:
        found = self.saved() | {"decisions": [(d.name, d.masked, d.density, d.why) for d in self.dgm.decisions()]}
        self.dgm.close()
        return found


LATE = ["backbone.0", "backbone.2", "neck"]


class Offset(torch.optim.Adam):
    """A fresh parameter of its has moments of 1 in a place that nothing but a trial shows."""

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.ones_like(p))
                    moment.add_(p.grad.abs() * 10)
                    p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("later", range(10, 24, 3))
def test_the_fresh_state_is_known_of_what_an_optimizer_gets_while_it_is_looked_at(later: int) -> None:
    """Gradients reach it before, so that it waits for a step when it is given to the optimizer."""

    def held(net: Net, step: int, optimizer: Any) -> None:
        if step == later:
            optimizer.add_param_group({"params": list(net.backbone.parameters()), "lr": 1e-3})

    run = Run(held)
    kept = {id(p) for p in run.net.backbone.parameters()}
    run.dgm.close()
    run.optimizer = Offset([p for p in run.net.parameters() if id(p) not in kept], 1e-2)
    run.dgm = DGMController(run.net, run.optimizer, CONFIG, total_steps=STEPS)
    run.go()
    mask, weight = run.dgm.masks()["backbone.0"], run.net.backbone[0].weight
    assert (run.optimizer.state[weight]["moment"][~mask] == 1).all()


@pytest.mark.parametrize("how", [frozen, held_later])
def test_layers_that_begin_to_train_are_masked_from_the_next_update_on(how: Any) -> None:
    run = Run(how).go(25)
    assert run.dgm.masks().keys() == {"top.0"}
    before = {name: run.net.get_submodule(name).weight.detach().abs().clone() for name in LATE}
    run.go(26)  # the audited step
    assert run.dgm.masks().keys() == {"top.0", *LATE}
    masks = run.dgm.masks()
    assert sum(int(masks[name].sum()) for name in LATE) == round(run.dgm.schedule(26).density * 3 * 256)
    for name in LATE:  # the largest stay, and are not scaled
        weight, mask = run.net.get_submodule(name).weight.detach(), masks[name]
        assert weight[mask].abs().min() >= before[name][~mask].max() - 0.03
        torch.testing.assert_close(weight.abs()[mask], before[name][mask], atol=0.03, rtol=0.0)
    run.go(31)
    assert sum(int(mask.sum()) for mask in run.dgm.masks().values()) == round(run.dgm.schedule(30).density * 4 * 256)
    end = run.go().end()
    assert run.dgm.density == run.dgm.final_density == pytest.approx(0.1, abs=1e-3)
    why = {name: reason for name, _, _, reason in end["decisions"]}
    assert all("masked from step 26 on, as it began to train" in why[name] for name in LATE)
    assert why["target"] == "no gradient reached it in the first 20 steps"
    assert run.dgm.late_layers() == []


@pytest.mark.parametrize("at", [5, 22, 24, 25, 26, 30, 45])
@pytest.mark.parametrize("how", [frozen, held_later])
def test_a_resumed_run_equals_the_straight_one(how: Any, at: int) -> None:
    run = Run(how).go(at)
    saved = run.saved()
    straight = run.go().end()
    assert differences(Run(how, saved=saved).go().end(), straight) == []


def test_a_layer_that_trains_once_is_looked_at_and_left() -> None:
    run = Run(once).go(24)
    saved = run.saved()
    assert saved["dgm"]["late_layers"] == {"neck": True, "target": False}
    straight = run.go(27).end()
    why = {name: reason for name, _, _, reason in straight["decisions"]}
    assert why["neck"] == "no gradient reached it when it was looked at, at step 26"
    assert "neck" in straight["dgm"]["late_layers"]
    assert differences(Run(once, saved=saved).go(27).end(), straight) == []


def test_the_choice_of_layers_and_heads_holds_for_late_ones_too() -> None:
    config = DGMConfig(SCHEDULE, Units(size=1), backend="dense", selection=Selection(exclude=["backbone.0"]))
    run = Run(frozen, config).go()
    assert run.dgm.masks().keys() == {"top.0", "backbone.2", "neck"}
    run.dgm.close()


def test_layers_that_train_after_the_last_update_are_named() -> None:
    run = Run(lambda net, step, _: net.backbone.requires_grad_(step >= 50)).go()
    assert run.dgm.masks().keys() == {"top.0", "neck"}
    assert run.dgm.late_layers() == ["backbone.0", "backbone.2"]
    run.dgm.close()


def test_a_run_may_begin_with_nothing_but_a_head_that_trains() -> None:
    class Probe(Net):
        def __init__(self) -> None:
            super().__init__()
            self.top = nn.Sequential()

    net = Probe()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    net.backbone.requires_grad_(False)
    net.neck.requires_grad_(False)
    net.target.requires_grad_(False)
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS) as dgm:
        for step in range(STEPS):
            net.backbone.requires_grad_(step >= THAWED)
            optimizer.zero_grad()
            net(X, 0).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            if step == 0:
                with pytest.warns(
                    RuntimeWarning, match=r"goes on dense.*4 layers \(backbone.0, .*masked once they train"
                ):
                    dgm.advance()
            else:
                dgm.advance()
        assert dgm.masks().keys() == {"backbone.0", "backbone.2"}
        assert dgm.density == dgm.final_density == pytest.approx(0.1, abs=2e-3)
    frozen_net = Probe()
    for part in (frozen_net.backbone, frozen_net.neck, frozen_net.target):
        part.requires_grad_(False)
    adam = torch.optim.Adam(frozen_net.parameters())
    with pytest.raises(ValueError, match="what BackboneFinetuning or the like thaws later is not seen"):
        DGMController(frozen_net, adam, CONFIG, total_steps=STEPS, audit=False)
