"""Failures beside the training: a meter, a logger, a GPU or a file may fail, the run goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from helpers.energy_parts import ConstantPower, FakeGpu, Machine
from helpers.energy_runs import WATTS, Net, Phases, data, monitor, rows, trainer
from lightning_estdgm.callbacks._internal import energy_fit
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Reading
from lightning_estdgm.energy._totals import Totals

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")

A, B, C = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000"


def test_a_gpu_that_is_lost_in_mid_run_is_a_gap_and_is_named(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [FakeGpu(uuid, watts=100, name=f"Fake {uuid[4]}") for uuid in (A, B, C)]
    lost = [whole[0], FakeGpu(B, handle=15, energy=15), whole[2]]

    class Fall(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 60:
                machine.show(*lost)

    machine.show(*whole)
    mon = EnergyMonitor(["nvml"], interval_s=0.1)
    run = trainer(tmp_path, mon, Fall(), logger=CSVLogger(tmp_path, "csv", ""))
    run.fit(Net(), data(800))
    assert run.global_step == 200
    summary = mon.summary()
    devices = {device["uid"]: device for device in summary["sources"][0]["devices"]}
    assert list(devices) == [A, B, C]
    assert 0 < devices[B]["joules"] < devices[A]["joules"]
    assert devices[A]["joules"] == pytest.approx(devices[C]["joules"], rel=0.05)
    (failing,) = summary["failing"]
    assert (failing["kind"], failing["uid"], failing["name"]) == ("gpu", B, "Fake b, energy counter")
    assert summary["gaps"] == 1
    assert summary["coverage_ratio"] < 0.95
    assert caplog.text.count(f"gpu {B} on ") == 1
    assert json.loads((tmp_path / "csv" / "energy.json").read_text())["energy"]["failing"] == [failing]


def test_a_gpu_that_comes_back_is_not_named_as_failing(machine: Machine, tmp_path: Path) -> None:
    machine.show(FakeGpu(A, watts=100), FakeGpu(B, watts=100))

    class Flicker(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step in (60, 120):
                lost = trainer.global_step == 60
                machine.show(FakeGpu(A, watts=100), FakeGpu(B, watts=100, handle=15 * lost, energy=15 * lost))

    mon = EnergyMonitor(["nvml"], interval_s=0.1)
    trainer(tmp_path, mon, Flicker()).fit(Net(), data(800))
    assert (mon.summary()["failing"], mon.summary()["gaps"]) == ([], 1)


def test_a_device_that_fails_before_an_exception_is_named_in_its_file(tmp_path: Path) -> None:
    source = ConstantPower()

    class Unplug(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            source.raises = True

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, monitor(source), Unplug()).fit(Net(fail_at=3), data())
    content = json.loads((tmp_path / "energy.json").read_text())
    assert [device["uid"] for device in content["energy"]["failing"]] == ["c0"]


def test_a_device_that_fails_is_named_also_where_no_file_is_written(tmp_path: Path) -> None:
    source = ConstantPower()

    class Unplug(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            source.raises = True

    mon = monitor(source)
    trainer(tmp_path, mon, Unplug(), fast_dev_run=3).fit(Net(), data())
    assert [device["uid"] for device in mon.summary()["failing"]] == ["c0"]


def test_a_device_that_fails_on_another_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, gather = ConstantPower(), energy_fit._gather

    def with_another_rank(trainer: Trainer, own: Any) -> list[Any]:
        sums = isinstance(own[0], Totals)
        return [*gather(trainer, own), *([(Totals(), {}, (source.device,))] if sums else [])]

    monkeypatch.setattr(energy_fit, "_gather", with_another_rank)
    mon = monitor(source)
    trainer(tmp_path, mon).fit(Net(), data())
    assert [device["uid"] for device in mon.summary()["failing"]] == ["c0"]
    assert mon.summary()["gaps"] == 0


def test_a_source_that_answers_with_nonsense_is_a_gap(tmp_path: Path) -> None:
    class Nonsense(ConstantPower):
        def read(self, devices: Any = None) -> Any:
            return None

    mon = monitor(Nonsense())
    trainer(tmp_path, mon).fit(Net(), data())
    assert (mon.total_joules, mon.summary()["steps"], mon.summary()["gaps"]) == (None, 8, 1)


@pytest.mark.parametrize(
    "odd",
    [
        (1, 2),
        Reading(0, energy_uj="7"),  # type: ignore[arg-type]
        Reading(0, energy_uj=float("inf")),  # type: ignore[arg-type]
        Reading(0, power_mw=float("nan")),  # type: ignore[arg-type]
        Reading("now", energy_uj=7),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_a_reading_that_is_none_is_a_gap_of_its_device(tmp_path: Path, odd: Any) -> None:
    class Odd(ConstantPower):
        other = DeviceId("host", "gpu", "c1")

        def devices(self) -> Any:
            return {**super().devices(), self.other: DeviceInfo("the other")}

        def read(self, devices: Any = None) -> Any:
            return {**super().read(), self.other: odd}

    mon = monitor(Odd(watts=WATTS))
    trainer(tmp_path, mon).fit(Net(), data())
    summary = json.loads((tmp_path / "energy.json").read_text(), parse_constant=pytest.fail)["energy"]
    assert (summary["gaps"], [device["uid"] for device in summary["failing"]]) == (1, ["c1"])
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"], rel=0.2)


@pytest.mark.parametrize("kind", [np.uint32, np.int64, np.float64, int], ids=lambda kind: kind.__name__)
def test_a_counter_of_any_type_of_number_gives_its_joules(tmp_path: Path, kind: Any) -> None:
    class Numbers(ConstantPower):
        range_uj = 2**32 - 1
        at_uj = range_uj - 2_500_000

        def wrap_range_uj(self, device: Any) -> Any:
            return kind(self.range_uj)

        def read(self, devices: Any = None) -> Any:
            time.sleep(0.002)  # 1 J in it is 500 W: less than what is taken for a reset
            self.events.append("read")
            self.at_uj += 1_000_000
            return {self.device: Reading(time.monotonic_ns(), energy_uj=kind(self.at_uj % self.range_uj))}

    source = Numbers()
    mon = monitor(source, interval_s=3600.0)
    trainer(tmp_path, mon).fit(Net(), data())
    assert mon.total_joules == source.events.count("read") - 1 > 3
    assert mon.summary()["gaps"] == 0


def test_where_no_thread_can_be_started_the_boundaries_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse, raising=False)  # up to Python 3.12
    monkeypatch.setattr(threading, "_start_joinable_thread", refuse, raising=False)  # Python 3.13
    mon = monitor()
    with pytest.warns(UserWarning, match="can't start new thread: energy is read when it is logged or the phase"):
        trainer(tmp_path, mon).fit(Net(), data())
    summary = mon.summary()
    assert (summary["steps"], summary["gaps"], summary["coverage_ratio"]) == (8, 0, pytest.approx(1.0, abs=0.2))
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"], rel=0.2)


class NoEnergy(CSVLogger):
    """Refuses the metrics of energy, as a service may that is not reached."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("energy/") for name in metrics):
            raise ConnectionError("no route")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_said_once_and_the_others_are_written(tmp_path: Path) -> None:
    loggers = [NoEnergy(tmp_path, "first", ""), CSVLogger(tmp_path, "second", "")]
    with pytest.warns(
        UserWarning, match="energy metrics to NoEnergy cannot be written: ConnectionError: no route"
    ) as w:
        trainer(tmp_path, monitor(), logger=loggers).fit(Net(), data())
    assert len([each for each in w if "NoEnergy" in str(each.message)]) == 1
    assert len([row for row in rows(tmp_path / "second") if "energy/total_joules" in row]) == 5


def test_a_page_of_curves_that_tensorboard_refuses_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no such plugin")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_custom_scalars", refuse)
    mon = monitor()
    with pytest.warns(UserWarning, match="the page of energy curves cannot be written: RuntimeError: no such plugin"):
        trainer(tmp_path, mon, logger=TensorBoardLogger(tmp_path, "tb", "")).fit(Net(), data())
    assert mon.summary()["steps"] == 8


def test_a_run_that_cannot_be_described_is_measured_all_the_same(tmp_path: Path) -> None:
    class Shy(CSVLogger):
        @property
        def name(self) -> str:
            raise OSError("the server is gone")

    mon = monitor()
    run = trainer(tmp_path, mon)
    logger = Shy(tmp_path, "csv", "")

    class Later(Callback):
        """A logger whose server is gone once the fit begins."""

        def setup(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.loggers = [logger]

        def on_fit_start(self, trainer: Trainer, *args: Any) -> None:
            trainer.loggers = []

    run.callbacks = [mon, Later()]
    with pytest.warns(UserWarning, match=r"so it writes no energy\.json: OSError: the server is gone"):
        run.fit(Net(), data())
    assert mon.summary()["steps"] == 8
    assert not list(tmp_path.rglob("energy*.json"))


class Moody(Callback):
    """Has a property `phase` of its own, which is not ready."""

    @property
    def phase(self) -> str:
        raise ValueError("the moon has not risen")


def test_another_callbacks_phase_that_fails_is_passed_over(tmp_path: Path) -> None:
    mon = monitor()
    trainer(tmp_path, Moody(), mon, Phases()).fit(Net(), data())
    assert list(mon.summary()["by_phase"]) == ["setup", "exploration", "refinement"]
    assert (tmp_path / "energy.json").exists()


@pytest.mark.parametrize("state", [{"totals": {"version": 99}}, {"totals": None}], ids=["newer", "broken"])
def test_an_energy_state_that_cannot_be_read_does_not_end_a_restart(tmp_path: Path, state: dict[str, Any]) -> None:
    run = trainer(tmp_path, monitor())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    checkpoint["callbacks"]["EnergyMonitor"] = state
    torch.save(checkpoint, tmp_path / "a.ckpt")
    mon = monitor()
    run = trainer(tmp_path / "again", mon, max_epochs=2)
    with pytest.warns(UserWarning, match="the energy in the checkpoint cannot be read"):
        run.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert mon.summary()["steps"] == 8
