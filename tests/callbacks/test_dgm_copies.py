"""Copies and pickles of a callback, of a model and of a Trainer, before, during and after a fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from helpers.models import MLP, NO_VALIDATION_LOADER, TinyMLP, make_trainer
from helpers.runs import SCHEDULE, differences
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.callbacks.energy import EnergyMonitor

pytestmark = [pytest.mark.filterwarnings(NO_VALIDATION_LOADER)]


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"pickle": pickled, "deepcopy": copy.deepcopy, "torch.save": saved}


class CopyAt(pl.Callback):
    """Copies all that it can reach after some steps; 0: before the first."""

    def __init__(self, how: Callable[[Any], Any], steps: int) -> None:
        self.how, self.steps, self.seen = how, steps, {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._copy(trainer, pl_module, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._copy(trainer, pl_module, trainer.global_step)

    def _copy(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        if step == self.steps:
            dgm = trainer.callbacks[0]
            self.seen = {"callback": self.how(dgm), "model": self.how(pl_module.net), "summary": dgm.run_summary()}
            self.how(trainer.optimizers[0])
            self.seen["state"] = copy.deepcopy(dgm.state_dict())


def fit(*callbacks: pl.Callback, cls: Any = TinyMLP, **trainer: Any) -> tuple[Any, DGMCallback, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module, dgm = cls(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    made = make_trainer(dgm, *callbacks, **{"max_epochs": 5} | trainer)
    made.fit(module, cls.batches(8))
    return module, dgm, made


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_callback_has_the_result_of_its_fit(how: str) -> None:
    module, dgm, trainer = fit()
    twin = COPIES[how](dgm)
    assert twin.controller is None
    assert differences(twin.masks(), dgm.masks()) == []
    assert twin.decisions() == dgm.decisions()
    assert twin.run_summary() == dgm.run_summary()
    assert twin.run_summary()["density"] == pytest.approx(0.1, abs=0.002)
    assert differences(twin.state_dict(), dgm.state_dict()) == []
    assert (twin.phase, twin.density, twin.flops_ratio, twin.schedule) == (
        dgm.phase,
        dgm.density,
        dgm.flops_ratio,
        dgm.schedule,
    )
    COPIES[how](module)
    COPIES[how](trainer.callbacks)
    # And it trains another model as a new callback does.
    pl.seed_everything(0, verbose=False)
    other = TinyMLP()
    make_trainer(twin, max_epochs=5).fit(other, TinyMLP.batches(8))
    assert differences(other.state_dict(), module.state_dict()) == []


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_copies_in_mid_run_are_plain_and_leave_the_run_alone(how: str, steps: int) -> None:
    look = CopyAt(COPIES[how], steps)
    module, dgm, _ = fit(look, cls=MLP)
    straight, plain, _ = fit(cls=MLP)
    assert differences(module.state_dict(), straight.state_dict()) == []
    assert [d.density for d in dgm.decisions()] == [d.density for d in plain.decisions()]
    twin = look.seen["callback"]
    assert differences(twin.state_dict(), look.seen["state"]) == []
    assert twin.run_summary() == look.seen["summary"]
    # The model's copy is watched by nobody.
    before = copy.deepcopy(dgm.state_dict())
    look.seen["model"](MLP.batches(1)[0][0]).sum().backward()
    assert differences(dgm.state_dict(), before) == []
    assert not [name for name in dir(look.seen["model"]) if "estdgm" in name]


def test_a_copy_of_the_model_from_the_first_step_is_not_taken_for_the_model() -> None:
    """Its head feeds a layer of the model, whose own head feeds none."""

    class Twin(TinyMLP):
        def on_train_start(self) -> None:
            self.__dict__["twin"] = copy.deepcopy(self.net)  # no part of the model, as a target network outside it

        def loss(self, batch: Any) -> Any:
            guess = self.twin(batch[0])
            wide = F.pad(guess, (0, self.net[0].in_features - guess.shape[-1]))
            return super().loss(batch) + 0.0 * self.net[0](wide).square().mean()

    _, dgm, _ = fit(cls=Twin)
    _, expected, _ = fit()
    assert [(d.name, d.masked) for d in dgm.decisions()] == [(d.name, d.masked) for d in expected.decisions()]
    assert not dgm.decisions()[-1].masked


def test_a_second_fit_in_other_processes_has_its_callbacks_sent_there(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, dgm = TinyMLP(), DGMCallback()
    for _ in range(2):  # the second time with a result of the first
        energy = EnergyMonitor(["cpu-estimate"])
        settings = {"strategy": "ddp_spawn", "max_epochs": 1, "default_root_dir": tmp_path}
        trainer = make_trainer(dgm, energy, **settings)
        trainer.fit(module, TinyMLP.batches(16))
        assert dgm.state_dict()["steps"] == 16
        summary = dgm.run_summary()
        assert summary["density"] == summary["final_density"] == pytest.approx(0.1, abs=0.002)
        assert summary["ended_as_asked"] is True
        assert dgm.controller is None
