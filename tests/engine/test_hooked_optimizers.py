"""Optimizers that wrap others, or whose hooks torch never runs: steps that move the weights are found or refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from helpers.controller_runs import STEPS, WEIGHTS, adamw, batch, loss_of
from helpers.storages import config, double, largest_difference
from lightning_estdgm import DGMController


class Forwarding(torch.optim.Optimizer):
    """As NeMo's EMAOptimizer: no initialisation of the base class, attributes of the inner optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state


class OwnDicts(torch.optim.Optimizer):
    """As pytorch-optimizer's Lookahead: hook dictionaries made by hand, which its `step` never looks at."""

    def __init__(self, inner: torch.optim.Optimizer, kind: type = OrderedDict) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = kind(), kind()
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults: dict[str, Any] = {}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Twice(torch.optim.SGD):
    """Its `step` and the one it calls are both patched by torch once an SGD has been made: hooks run twice a step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Outer(torch.optim.Optimizer):
    """Initialised itself, and steps by another optimizer inside its own step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


class Blind(torch.optim.Optimizer):
    """Moves the weights by itself, and runs no hook."""

    def __init__(self, params: Any) -> None:
        self.param_groups, self.state, self.defaults = [{"params": list(params), "lr": 0.1}], {}, {}

    def step(self, closure: Any = None) -> None:
        pass


class Chained(torch.optim.Optimizer):
    """Several optimizers as one, in a container: their groups one after another, or one group of its own over all."""

    def __init__(self, several: list[torch.optim.Optimizer], hold: Callable[[Any], Any], *, own_group: bool) -> None:
        groups = [group for optimizer in several for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        if not own_group:
            self.param_groups = groups
        self.several = hold(several)

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for optimizer in self.several.values() if isinstance(self.several, dict) else self.several:
            optimizer.step()
        return loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


WRAPPED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "attributes of the inner one": lambda model: Forwarding(sgd(model)),
    "dictionaries by hand": lambda model: OwnDicts(sgd(model)),
    "plain dictionaries": lambda model: OwnDicts(sgd(model), dict),
    "a subclass that calls super().step()": lambda model: Twice(model.parameters(), 0.1),
    "a step inside a step": lambda model: Outer(model.parameters(), 0.1),
    "two wrappers": lambda model: Forwarding(OwnDicts(sgd(model))),
}


def trained(
    make_mlp: Any, make: Callable[[nn.Module], torch.optim.Optimizer], wrap: Any = None
) -> tuple[nn.Module, Any]:
    model = make_mlp(16, 32, 32, 4, dtype=torch.float64)
    net, optimizer = (model, make(model)) if wrap is None else wrap(model, make(model))
    generator = torch.Generator().manual_seed(0)
    with DGMController(net, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for _ in range(STEPS):
            x = torch.randn(8, 16, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            dgm.mask_gradients(optimizer)
            optimizer.step()
            dgm.advance()
        return model, (dgm.steps, dgm.density)


@pytest.fixture
def expected(mlp: Any) -> tuple[nn.Module, Any]:
    return trained(mlp, sgd)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_optimizer_trains_as_the_one_it_wraps(mlp: Any, name: str, expected: tuple[nn.Module, Any]) -> None:
    model, told = trained(mlp, WRAPPED[name])
    assert told == expected[1]
    assert told[0] == STEPS
    for mine, theirs in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("own_group", [False, True], ids=["their groups", "one group"])
@pytest.mark.parametrize("hold", [list, tuple, lambda several: dict(enumerate(several))], ids=["list", "tuple", "dict"])
def test_several_optimizers_in_one_train_as_they_do_apart(mlp: Any, hold: Any, own_group: bool, storage: str) -> None:
    models = []
    for apart in (True, False):
        model = double(mlp(32, 64, 64, 4))
        halves = [adamw(model[:2]), momentum(model[2:])]
        given = halves if apart else [Chained(halves, hold, own_group=own_group)]
        with DGMController(model, given, config(1, storage), total_steps=STEPS, audit=False) as dgm:
            for step in range(STEPS):
                for optimizer in halves:
                    optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                for optimizer in given:
                    optimizer.step()
                if dgm.advance() and storage == "dense":
                    dropped = ~dgm.masks()["0"]
                    assert not halves[0].state[model[0].weight]["exp_avg"][dropped].any()
            assert not any(weight.note for weight in dgm.masked_weights)
        models.append(model)
    assert largest_difference(*models) == 0.0


def test_fabrics_optimizer_trains_as_the_one_it_wraps(mlp: Any, expected: tuple[nn.Module, Any]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, told = trained(mlp, sgd, wrap=fabric.setup)
    assert told == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected[0].parameters(), strict=True))


def test_a_step_that_raises_is_no_longer_under_way(mlp: Any) -> None:
    model = mlp(16, 32, 32, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:

        def closure() -> None:
            raise RuntimeError("no loss today")

        with pytest.raises(RuntimeError, match="no loss today"):
            optimizer.step(closure)
        dgm.advance()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        assert dgm.steps == 0
        dgm.advance()
        assert dgm.steps == 1


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused_by_name(mlp: Any) -> None:
    model = mlp(16, 32, 32, 4)
    with pytest.raises(ValueError, match=r"steps of 2 masked layers \(0, 2\) cannot be seen: Blind runs no step hooks"):
        DGMController(model, Blind(model.parameters()), WEIGHTS, total_steps=STEPS, audit=False)


class ByLoss(torch.optim.SGD):
    """Its step takes the loss, as by Polyak's rule, or a batch size, where others take a closure."""

    @torch.no_grad()
    def step(self, loss: Any = 1.0) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * float(loss))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("value", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_a_first_argument_that_is_no_closure_reaches_the_step(mlp: Any, value: Any, by_name: bool) -> None:
    models = []
    for make in (lambda p: ByLoss(p, 0.05), lambda p: torch.optim.SGD(p, 0.1)):
        model = double(mlp(32, 64, 64, 4))
        optimizer = make(model.parameters())
        with DGMController(model, optimizer, config(1, "dense"), total_steps=STEPS, audit=False) as dgm:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                if not isinstance(optimizer, ByLoss):
                    optimizer.step()
                elif by_name:
                    optimizer.step(loss=value)
                else:
                    optimizer.step(value)
                dgm.advance()
            assert dgm.steps == STEPS
        models.append(model)
    assert largest_difference(*models) == 0.0
