"""EnergyMonitor in real Trainer runs, with real loggers."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from helpers.energy_parts import ConstantPower
from helpers.energy_runs import WATTS, Net, Phases, data, monitor, no_thread, rows, trainer
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.energy._reading import SourceUnavailable, Status

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to


def test_a_run_with_csv_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mon = monitor()
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer(tmp_path, mon, Phases(), logger=loggers).fit(Net(), data(), data(8))
    summary = mon.summary()
    assert no_thread()

    assert summary["total_joules"] == mon.total_joules
    covered_s = summary["seconds"] * summary["coverage_ratio"]
    assert summary["total_joules"] == pytest.approx(WATTS * covered_s, rel=1e-4)
    assert summary["coverage_ratio"] > 0.1
    assert summary["by_domain"] == {"gpu": summary["total_joules"], "cpu": None, "dram": None}
    assert summary["train_joules"] + summary["val_joules"] == pytest.approx(summary["total_joules"], abs=1e-5)
    assert summary["val_joules"] >= WATTS * 2 * 0.005
    assert (summary["steps"], summary["samples"]) == (8, 32)
    assert summary["joules_per_step"] == summary["train_joules"] / 8
    assert summary["joules_per_sample"] == summary["train_joules"] / 32
    assert (summary["method"], summary["gaps"]) == ("counter", 0)
    assert [s["name"] for s in summary["sources"]] == ["constant"]
    (device,) = summary["sources"][0]["devices"]
    assert device.pop("watts") == pytest.approx(WATTS, rel=1e-3)
    assert device.pop("joules") == summary["total_joules"]
    assert device == {"host": "host", "kind": "gpu", "uid": "c0", "name": "constant 100 W", "shared": False}
    assert summary["sources"][0]["driver"] == "constant 1.0"
    assert list(summary["by_phase"]) == ["setup", "exploration", "refinement"]
    assert sum(summary["train_by_phase"].values()) == pytest.approx(summary["train_joules"], abs=1e-5)
    assert sum(summary["by_phase"].values()) == pytest.approx(summary["total_joules"], abs=1e-5)
    assert summary["by_phase"]["exploration"] >= WATTS * 4 * 0.002
    assert summary["by_phase"]["refinement"] >= WATTS * (4 * 0.002 + 2 * 0.005)
    assert sum(summary["seconds_by_phase"].values()) == pytest.approx(summary["seconds"])

    logged = rows(tmp_path / "csv")
    energy = [row for row in logged if "energy/total_joules" in row]
    assert [int(row["step"]) for row in energy] == [1, 3, 5, 7, 8]  # every 2 steps, and the end
    names = {
        "energy/total_joules",
        "energy/gpu_joules",
        "energy/train_joules",
        "energy/val_joules",
        "energy/joules_per_step",
        "energy/joules_per_sample",
        "energy/phase/setup_joules",
        "energy/phase/exploration_joules",
        "energy/phase/refinement_joules",
        "energy/coverage_ratio",
        "energy/gaps",
        "energy/seconds",
        "power/gpu_watts",
        "power/gpu/0/0_watts",
        "power/total_watts",
    }
    assert set().union(*energy) - {"step", "epoch"} == names
    totals = [row["energy/total_joules"] for row in energy]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1] == pytest.approx(summary["total_joules"], abs=1e-5)
    assert energy[0]["power/gpu_watts"] == pytest.approx(WATTS, rel=0.01)

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    curve = events.Scalars("energy/total_joules")
    assert [e.step for e in curve] == [1, 3, 5, 7, 8]
    assert [e.value for e in curve] == pytest.approx(totals, rel=1e-6)


@pytest.mark.parametrize("monitor_first", [True, False])
def test_phases_are_right_in_any_order_of_the_callbacks(tmp_path: Path, monitor_first: bool) -> None:
    mon, phases = monitor(), Phases()
    order = (mon, phases) if monitor_first else (phases, mon)
    trainer(tmp_path, *order, limit_train_batches=4).fit(Net(), data())
    assert list(mon.summary()["by_phase"])[:2] == ["setup", "exploration"]
    assert mon.summary()["seconds_by_phase"]["exploration"] >= 4 * 0.002


def test_without_a_phase_all_is_train(tmp_path: Path) -> None:
    mon = monitor()
    trainer(tmp_path, mon, num_sanity_val_steps=1).fit(Net(), data(8), data(8))
    assert list(mon.summary()["by_phase"]) == ["train"]
    assert mon.summary()["val_joules"] >= WATTS * 3 * 0.005  # the sanity check is validation too


def test_estimated_is_said_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mon = EnergyMonitor(["cpu-estimate", ConstantPower(watts=WATTS)])
    with caplog.at_level("INFO"):
        trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    names = set().union(*rows(tmp_path / "csv"))
    energy = {name for name in names if re.match("(energy|power)/", name)}
    gpu = {"energy/gpu_joules", "power/gpu_watts", "power/gpu/0/0_watts"}
    plain = gpu | {"energy/coverage_ratio", "energy/gaps", "energy/seconds"}
    assert {name for name in energy if not name.endswith("_estimated")} == plain
    assert {"energy/cpu_joules_estimated", "energy/total_joules_estimated"} <= energy
    assert "energy/joules_per_step_estimated" in energy
    assert "energy/phase/train_joules_estimated" in energy
    summary = mon.summary()
    assert summary["method"] == "mixed"
    assert {s["name"]: s["method"] for s in summary["sources"]} == {
        "constant": "counter",
        "cpu-estimate": "estimated",
    }
    assert summary["measured_joules"] == summary["by_domain"]["gpu"]
    assert summary["estimated_joules"] == summary["by_domain"]["cpu"]
    assert "cpu: cpu-estimate (ESTIMATED, not measured)" in caplog.text
    assert "gpu: constant (counter)" in caplog.text


def test_no_sensor_runs_logs_seconds_and_says_once_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = ConstantPower(absent=SourceUnavailable(Status.NO_PERMISSION, "ask root"))
    mon = monitor(gone)
    with caplog.at_level("INFO"):
        trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    names = {name for row in rows(tmp_path / "csv") for name in row if "/" in name}
    assert names == {"energy/seconds"}
    assert mon.total_joules is None
    summary = mon.summary()
    assert (summary["method"], summary["total_joules"], summary["joules_per_step"]) == ("none", None, None)
    assert summary["seconds"] > 8 * 0.002
    assert summary["absent"] == [{"name": "constant", "status": "no_permission", "reason": "ask root"}]
    assert caplog.text.count("no joules, seconds only") == 1
    assert caplog.text.count("not used: constant (no_permission): ask root") == 1


def test_a_sensor_that_vanishes_in_mid_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ConstantPower(watts=WATTS)

    class Unplug(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            source.raises = trainer.global_step >= 3  # after the first log

    mon = monitor(source)
    trainer(tmp_path, mon, Unplug(), logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    summary = mon.summary()
    assert summary["gaps"] == 1
    assert 0 < summary["coverage_ratio"] < 1
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"] * summary["coverage_ratio"], rel=1e-4)
    logged = rows(tmp_path / "csv")
    assert "power/gpu_watts" in logged[0]
    assert "power/gpu_watts" not in logged[-1]
    assert logged[-1]["energy/gaps"] == 1
    assert caplog.text.count("gpu c0 on host cannot be read any more") == 1


def test_the_defaults_find_something_on_any_machine(tmp_path: Path) -> None:
    mon = EnergyMonitor()
    trainer(tmp_path, mon).fit(Net(), data())
    summary = mon.summary()
    assert summary["total_joules"] is not None
    assert summary["method"] != "none"
    found = {s["name"] for s in summary["sources"]} | {a["name"] for a in summary["absent"]}
    assert {"nvml", "rapl", "cpu-estimate"} <= found


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    source = ConstantPower()
    mon = monitor(source, interval_s=0.01)
    model = Net(fail_at=3)
    run = trainer(tmp_path, mon)
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(model, data())
    assert no_thread()
    assert source.events[-1] == "close"
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert mon.summary()["steps"] == 3
    assert mon.total_joules is not None


def test_validation_alone_measures_nothing(tmp_path: Path) -> None:
    mon = monitor()
    trainer(tmp_path, mon).validate(Net(), data(8), verbose=False)
    assert mon.total_joules is None
    assert no_thread()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"interval_s": 0}, ValueError, "interval_s must be > 0 seconds, got 0"),
        ({"interval_s": -1.0}, ValueError, "got -1.0"),
        ({"interval_s": float("nan")}, ValueError, "got nan"),
        ({"interval_s": "1"}, TypeError, "interval_s must be a number of seconds, got '1'"),
        ({"sources": ["nvlm"]}, ValueError, "unknown energy source 'nvlm'"),
        ({"sources": "nvml"}, TypeError, "a list of names and energy sources, got 'nvml'"),
        ({"sources": ConstantPower()}, TypeError, "got .*ConstantPower.*: write sources=.* for a single one"),
        ({"sources": [3]}, TypeError, "int lacks name"),
        ({"per": [len]}, TypeError, "per must map units to functions of the batch"),
        ({"per": {"Token": len}}, ValueError, "a lower-case name other than 'step', got 'Token'"),
        ({"per": {"step": len}}, ValueError, "a lower-case name other than 'step', got 'step'"),
        ({"per": {"token": 5}}, TypeError, r"per\['token'\] must be a function of the batch, got 5"),
        ({"idle_s": 0}, ValueError, "idle_s must be > 0 seconds or None, got 0"),
        ({"idle_s": float("inf")}, ValueError, "idle_s must be > 0 seconds or None, got inf"),
        ({"idle_s": "5"}, TypeError, "idle_s must be a number of seconds or None, got '5'"),
        ({"footprint": 380}, TypeError, "footprint must be a Footprint or None, got 380"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EnergyMonitor(**kwargs)


def test_two_monitors(tmp_path: Path) -> None:
    """Lightning itself refuses two callbacks with one key, where the Trainer is made."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `EnergyMonitor`"):
        trainer(tmp_path, monitor(), monitor())


def test_second_monitor_that_lightning_lets_pass(tmp_path: Path) -> None:
    class Own(EnergyMonitor):
        """Has a key of its own."""

    made = trainer(tmp_path, monitor(), Own([ConstantPower(watts=WATTS)]))
    with pytest.raises(ValueError, match=r"one EnergyMonitor in the Trainer, got 2: .*\(\[\"nvml\", \"rapl\"\]\)"):
        made.fit(Net(), data())
    assert list(tmp_path.iterdir()) == []
    assert no_thread()


class InWorkers(TensorDataset):
    """Tells in which process it is asked, and what that process inherited."""

    def __getitem__(self, index: int) -> Any:
        threads = [t for t in threading.enumerate() if t.name == "estdgm-energy"]
        return *super().__getitem__(index), torch.tensor([os.getpid(), len(threads)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_data_loader_workers_that_fork_read_nothing(tmp_path: Path) -> None:
    class Recorded(ConstantPower):
        def read(self, devices: Any = None) -> Any:
            with (tmp_path / "pids.txt").open("a") as file:
                file.write(f"{os.getpid()}\n")
            return super().read()

    class Seen(Net):
        pids: set[int] = set()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            self.pids |= set(batch[1][:, 0].tolist())
            assert batch[1][:, 1].sum() == 0  # no thread of ours there
            return super().training_step(batch, batch_idx)

    loader = DataLoader(InWorkers(torch.randn(16, 4)), batch_size=4, num_workers=2, multiprocessing_context="fork")
    mon = monitor(Recorded(), interval_s=0.002)
    trainer(tmp_path, mon).fit(Seen(), loader)
    assert len(Seen.pids) == 2
    assert set((tmp_path / "pids.txt").read_text().split()) == {str(os.getpid())}
    assert mon.summary()["samples"] == 16
