"""Totals of `EnergyMonitor` over checkpoints, restarts, further fits and copies."""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from helpers.energy_parts import ConstantPower
from helpers.energy_runs import WATTS, Net, data, monitor, no_thread, rows, trainer
from lightning_estdgm.callbacks.energy import EnergyMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to


@pytest.mark.parametrize("late", [False, True], ids=["restored before on_fit_start", "after it, as FSDP does"])
def test_totals_add_up_over_a_restart(tmp_path: Path, late: bool) -> None:
    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = property(lambda self: late)

    first = monitor()
    run = trainer(tmp_path, first, max_epochs=1, strategy=Late("cpu"))
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    one = first.summary()

    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert set(state) == {"EnergyMonitor"}  # a key without hyper-parameters

    second = monitor(ConstantPower(watts=WATTS, uid="another GPU"), interval_s=0.5)
    run = trainer(tmp_path, second, max_epochs=2, strategy=Late("cpu"), logger=CSVLogger(tmp_path, "csv", ""))
    run.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    both = second.summary()
    assert (one["steps"], one["samples"]) == (8, 32)
    assert (both["steps"], both["samples"]) == (16, 64)
    assert both["seconds"] > one["seconds"] + 8 * 0.002
    assert both["total_joules"] == pytest.approx(WATTS * both["seconds"] * both["coverage_ratio"], rel=1e-4)
    assert both["coverage_ratio"] > 0.1
    devices = {d["uid"]: d for d in both["sources"][0]["devices"]}
    assert set(devices) == {"c0", "another GPU"}
    assert rows(tmp_path / "csv")[0]["energy/total_joules"] > one["total_joules"]

    # A restart from the first checkpoint by the same object: the rolled-back epoch is not counted.
    run = trainer(tmp_path, second, max_epochs=1, strategy=Late("cpu"))
    run.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert second.summary()["steps"] == 8
    assert second.summary()["total_joules"] < both["total_joules"]


def test_a_phase_that_is_an_enum_is_its_text(tmp_path: Path) -> None:
    class Phase(str, enum.Enum):
        MAIN = "main"

    class Schedule(Callback):
        phase = Phase.MAIN

    mon = monitor()
    run = trainer(tmp_path, Schedule(), mon, max_epochs=1)
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert [type(phase) for phase in mon.summary()["by_phase"]] == [str]
    assert list(mon.summary()["by_phase"]) == ["main"]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["EnergyMonitor"]


def test_a_checkpoint_in_mid_run_holds_the_joules_until_then(tmp_path: Path) -> None:
    mon = monitor()
    states: list[dict[str, Any]] = []

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                states.append(mon.state_dict())

    trainer(tmp_path, mon, Save()).fit(Net(), data())
    resumed = monitor()
    resumed.load_state_dict(states[0])
    resumed.load_state_dict(states[0])  # twice is not double
    total = mon.total_joules
    assert resumed.summary()["steps"] == 4
    assert total is not None
    assert resumed.total_joules is not None
    assert WATTS * 4 * 0.002 <= resumed.total_joules < total


def test_testing_a_checkpoint_does_not_take_back_joules(tmp_path: Path) -> None:
    class Tested(Net):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            pass

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    mon = monitor()
    run = trainer(tmp_path, mon, Save())
    run.fit(Tested(), data())
    total = mon.total_joules
    run.test(Tested(), data(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert mon.total_joules == total


def test_fitting_on_adds_up(tmp_path: Path) -> None:
    mon = monitor()
    for steps in (8, 16):
        trainer(tmp_path, mon).fit(Net(), data())
        assert mon.summary()["steps"] == steps


class Sick(Net):
    """Raises in its first validation."""

    is_well = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.is_well:
            raise RuntimeError("in the sanity check")


def test_a_fit_of_another_run_on_top_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> int:
        found = [r for r in caplog.records if "holds the joules of an earlier fit" in r.getMessage()]
        caplog.clear()
        return len(found)

    def another(mon: EnergyMonitor, **settings: Any) -> Trainer:
        folders.append(tmp_path / str(len(folders)))
        return trainer(folders[-1], mon, **settings)

    folders: list[Path] = []
    mon, net = monitor(), Net()
    run = another(mon)
    run.fit(net, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.fit_loop.max_epochs = 2
    run.fit(net, data())
    assert said() == 0  # the same run, which goes on
    broken = another(again := monitor(), num_sanity_val_steps=1)
    with pytest.raises(RuntimeError, match="in the sanity check"):
        broken.fit(sick := Sick(), data(), data())
    sick.train().is_well = True
    broken.fit(sick, data(), data())
    assert said() == 0
    assert again.summary()["steps"] > 0
    for late in (False, True):
        strategy = SingleDeviceStrategy("cpu")
        strategy.__class__ = type("Late", (SingleDeviceStrategy,), {"restore_checkpoint_after_setup": late})
        another(mon, max_epochs=2, strategy=strategy).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
        assert said() == 0  # its totals are those of the checkpoint
    by_hand = monitor()
    by_hand.load_state_dict(mon.state_dict())
    another(by_hand).fit(net, data())
    assert said() == 0

    another(mon).fit(net, data())
    assert said() == 1  # another Trainer
    run = another(mon)
    run.fit(Net(), data())
    assert said() == 1
    run.fit_loop.max_epochs = 2
    run.fit(Net(), data())
    assert said() == 1  # another model
    another(pickle.loads(pickle.dumps(mon))).fit(Net(), data())
    assert said() == 1
    another(monitor()).fit(Net(), data())
    assert said() == 0


def test_it_can_be_pickled_in_mid_run(tmp_path: Path) -> None:
    mon = EnergyMonitor(["cpu-estimate"])
    copies: list[EnergyMonitor] = []

    class Copy(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(mon)))

    trainer(tmp_path, mon, Copy(), limit_train_batches=1).fit(Net(), data())
    assert copies[0]._fit is None
    trainer(tmp_path, copies[0]).fit(Net(), data())
    assert copies[0].summary()["steps"] >= 8


def test_a_tuner_in_the_same_fit_loses_and_doubles_nothing(tmp_path: Path) -> None:
    mon = monitor()

    class Tuned(Net):
        lr = 0.1

    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None)
    trainer(tmp_path, mon, finder, logger=CSVLogger(tmp_path, "csv", "")).fit(Tuned(), data())
    summary = mon.summary()
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"] * summary["coverage_ratio"], rel=1e-4)
    assert summary["coverage_ratio"] <= 1.0
    assert summary["steps"] == 8  # a tuner searches before any other callback starts
    assert no_thread()
