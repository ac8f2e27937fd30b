"""Steps counted by EnergyMonitor for optimizers that wrap others, have no hooks, or clear gradients themselves."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from helpers.default_device import set_default_device
from helpers.energy_runs import Net, data, monitor, trainer
from lightning_estdgm.callbacks._internal.work_counters import StepCounter

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


class Proxy:
    """No Optimizer itself: what it lacks is its inner optimizer's, as of Fabric's and Accelerate's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict  # lightning looks for these

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Both(NoDicts):
    """Steps two optimizers, each of its own parameters, in one step."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        super().__init__(first)
        self.second = second
        self.param_groups = first.param_groups + second.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.second.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.second.zero_grad(set_to_none)


class Again(NoDicts):
    """Steps its inner optimizer twice in one step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.inner.step()
        return loss


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
    [
        sgd,
        lambda p: NoDicts(sgd(p)),
        Blind,
        lambda p: Twice(p, 0.1),
        lambda p: Clearing(p, 0.1),
        lambda p: Proxy(Twice(p, 0.1)),
        lambda p: Both(sgd(p[:1]), sgd(p[1:])),
        lambda p: Again(sgd(p)),
    ],
    ids=["sgd", "no dictionaries", "blind", "super().step()", "clears", "proxy", "two", "inner twice"],
)
def test_every_step_counts_once(make: Any, tmp_path: Path) -> None:
    sgd(nn.Linear(1, 1).parameters())  # from now on SGD.step runs hooks

    class Module(Net):
        def configure_optimizers(self) -> Any:
            return make(list(self.parameters()))

    meter = monitor()
    run = trainer(tmp_path, meter)
    run.fit(Module(), data())
    assert meter.summary()["steps"] == STEPS == run.global_step


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("make", [lambda p: Both(sgd(p[:1]), sgd(p[1:])), Blind, lambda p: Proxy(sgd(p))])
def test_a_skipped_step_of_a_wrapper_is_no_step(make: Any, tmp_path: Path) -> None:
    class Module(Net):
        def configure_optimizers(self) -> Any:
            return make(list(self.parameters()))

    meter = monitor()
    trainer(tmp_path, meter).fit(Module(skip=(1, 5)), data())
    assert meter.summary()["steps"] == STEPS - 2


@pytest.mark.parametrize("use_pl_optimizer", [True, False])
@pytest.mark.parametrize("make", [sgd, lambda p: NoDicts(sgd(p))])
def test_steps_of_manual_optimization_are_counted(make: Any, use_pl_optimizer: bool, tmp_path: Path) -> None:
    class Manual(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return make(list(self.parameters()))

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=use_pl_optimizer)
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch[0]).square().mean())
                optimizer.step()

    meter = monitor()
    trainer(tmp_path, meter).fit(Manual(), data())
    assert meter.summary()["steps"] == 2 * STEPS


def test_an_optimizer_that_shows_no_parameters_is_counted() -> None:
    bare = object()
    counter = StepCounter([bare])
    counter.note_gradients(bare)
    assert counter.steps == 1


def test_an_optimizer_that_takes_the_others_place_is_counted(tmp_path: Path) -> None:
    used = []

    class Swap(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (2, 5):
                used.append(trainer.optimizers[0])
                trainer.strategy.optimizers = [sgd(module.parameters())]

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)  # of whose steps Lightning tells nobody
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())
            optimizer.step()

    meter = monitor()
    run = trainer(tmp_path, meter, Swap())
    run.fit(Manual(), data())
    assert meter.summary()["steps"] == STEPS
    for optimizer in (*used, *run.optimizers):
        assert not any(vars(optimizer)[f"_optimizer_step_{when}_hooks"] for when in ("pre", "post"))


def test_a_step_that_fails_and_is_caught_hides_no_later_one(tmp_path: Path) -> None:
    class Fails(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            Fails.calls += 1
            if Fails.calls == 2:
                raise MemoryError
            return loss

    class Manual(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return Fails(self.parameters(), 0.1)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())
            with contextlib.suppress(MemoryError):
                optimizer.step()

    meter = monitor()
    trainer(tmp_path, meter).fit(Manual(), data())
    assert meter.summary()["steps"] == STEPS - 1


@pytest.mark.parametrize("sparse_weight", [False, True], ids=["sparse gradient", "sparse parameter"])
def test_sparse_layouts_are_counted_like_others(tmp_path: Path, sparse_weight: bool) -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4, sparse=True)
            if sparse_weight:
                self.table = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.layer(self.words(batch[0].long() % 5)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.0)

    meter = monitor()
    trainer(tmp_path, meter, max_epochs=1).fit(Words(), data())
    assert meter.summary()["steps"] == STEPS
    content = json.loads((tmp_path / "energy.json").read_text())
    assert content["run"]["model"]["parameters"] == 5 + 20 + 16 * sparse_weight


class _Drawn:
    """Batches drawn beforehand: a DataLoader draws its seed on the default device."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("how", ["default device", "context"])
def test_another_default_device_changes_nothing(tmp_path: Path, how: str) -> None:
    """Whoever trains on one device may have torch make new tensors on another one, here on one without values."""

    model, batches = Net(), _Drawn(data())
    meter = monitor(idle_s=0.01)
    run = trainer(tmp_path, meter, logger=CSVLogger(tmp_path, "csv", ""))
    if how == "context":
        with torch.device("meta"):
            run.fit(model, batches)
    else:
        set_default_device("meta")
        try:
            run.fit(model, batches)
        finally:
            set_default_device(None)
    summary = meter.summary()
    assert (summary["steps"], summary["samples"]) == (STEPS, 32)
    assert summary["total_joules"] > 0
    assert json.loads((tmp_path / "csv" / "energy.json").read_text())["energy"] == summary
