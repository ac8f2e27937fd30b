"""Steps counted by EnergyMonitor for optimizers that wrap others, have no hooks, or clear gradients themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.energy_runs import Net, data, monitor, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

STEPS = 8  # batches of helpers.energy_runs.data


class NoDicts(torch.optim.Optimizer):
    """A wrapper without the dictionaries of hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults: dict[str, Any] = {}

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Blind(torch.optim.Optimizer):
    """Runs no hook, and wraps nothing that does."""

    def __init__(self, params: Any) -> None:
        self.param_groups, self.state, self.defaults = [{"params": list(params), "lr": 0.1}], {}, {}

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class Twice(torch.optim.SGD):
    """Torch runs its hooks twice a step, once an SGD has been made."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Clearing(torch.optim.SGD):
    """Clears the gradients inside its step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad()
        return loss


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)


@pytest.mark.parametrize(
    "make",
    [sgd, lambda p: NoDicts(sgd(p)), Blind, lambda p: Twice(p, 0.1), lambda p: Clearing(p, 0.1)],
    ids=["sgd", "no dictionaries", "blind", "super().step()", "clears"],
)
def test_every_step_counts_once(make: Any, tmp_path: Path) -> None:
    sgd(nn.Linear(1, 1).parameters())  # from now on SGD.step runs hooks

    class Module(Net):
        def configure_optimizers(self) -> Any:
            return make(list(self.parameters()))

    meter = monitor()
    trainer(tmp_path, meter).fit(Module(), data())
    assert meter.summary()["steps"] == STEPS
