"""EnergyMonitor in real Trainer runs, with real loggers."""

from __future__ import annotations

import csv
import os
import pickle
import re
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.energy_parts import ConstantPower
from lightning_estdgm.callbacks.energy import EnergyMonitor, _batch_size
from lightning_estdgm.energy.footprint import Footprint
from lightning_estdgm.energy.reading import DeviceId, Reading, SourceUnavailable, Status

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to
WATTS = 100.0


class Net(LightningModule):
    def __init__(self, skip: tuple[int, ...] = (), fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.skip, self.fail_at = skip, fail_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == self.fail_at:
            raise RuntimeError("out of luck")
        time.sleep(0.002)
        return None if batch_idx in self.skip else self.layer(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(0.005)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Phases(Callback):
    """Stands where DGMCallback stands: moves on at the end of a batch."""

    def __init__(self) -> None:
        self.phase = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.phase = "exploration"

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.phase = "exploration" if trainer.global_step < 4 else "refinement"


def data(n: int = 32, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 4)), batch_size=batch_size)


def trainer(tmp_path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | kwargs))


def monitor(*sources: ConstantPower, **kwargs: Any) -> EnergyMonitor:
    return EnergyMonitor(list(sources) or [ConstantPower(watts=WATTS)], **kwargs)


def no_thread() -> bool:
    return not [t for t in threading.enumerate() if t.name == "estdgm-energy"]


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


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


@pytest.mark.parametrize("late", [False, True], ids=["restored before on_fit_start", "after it, as FSDP does"])
def test_totals_add_up_over_a_restart(tmp_path: Path, late: bool) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

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


def test_real_steps_are_counted_and_logged_once_each(tmp_path: Path) -> None:
    mon = monitor()
    run = trainer(tmp_path, mon, accumulate_grad_batches=2, logger=CSVLogger(tmp_path, "csv", ""), log_every_n_steps=1)
    run.fit(Net(), data())
    assert mon.summary()["steps"] == 4
    assert mon.summary()["samples"] == 32
    assert [int(row["step"]) for row in rows(tmp_path / "csv")] == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_skipped_step_is_no_step(tmp_path: Path) -> None:
    mon = monitor()
    run = trainer(tmp_path, mon)
    run.fit(Net(skip=(1, 5)), data())
    assert run.global_step == 8
    assert mon.summary()["steps"] == 6


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


def test_it_can_be_pickled_in_mid_run(tmp_path: Path) -> None:
    mon = EnergyMonitor(["cpu-estimate"])
    copies: list[EnergyMonitor] = []

    class Copy(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(mon)))

    trainer(tmp_path, mon, Copy(), limit_train_batches=1).fit(Net(), data())
    assert copies[0]._meter is None
    trainer(tmp_path, copies[0]).fit(Net(), data())
    assert copies[0].summary()["steps"] >= 8


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"interval_s": 0}, ValueError, "interval_s must be > 0 seconds, got 0"),
        ({"interval_s": -1.0}, ValueError, "got -1.0"),
        ({"interval_s": float("nan")}, ValueError, "got nan"),
        ({"interval_s": "1"}, TypeError, "interval_s must be a number of seconds, got '1'"),
        ({"sources": ["nvlm"]}, ValueError, "unknown energy source 'nvlm'"),
        ({"sources": "nvml"}, TypeError, "a list of names and energy sources, got 'nvml'"),
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


def test_a_batch_size_is_known_only_where_all_tensors_agree() -> None:
    x = torch.zeros(3, 2)
    assert _batch_size(x) == 3
    assert _batch_size({"x": x, "y": [x[:, 0], torch.tensor(1.0)], "name": "n"}) == 3
    assert _batch_size((x, torch.zeros(5))) is None
    assert _batch_size(["text"]) is None
    assert _batch_size(torch.tensor(1.0)) is None


def test_an_unknown_batch_size_leaves_joules_per_sample_out(tmp_path: Path) -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

    loader = DataLoader([(torch.randn(4), torch.randn(2))] * 8, batch_size=None)
    mon = monitor()
    trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Odd(), loader)
    assert mon.summary()["joules_per_sample"] is None
    assert mon.summary()["joules_per_step"] is not None
    assert not [name for row in rows(tmp_path / "csv") for name in row if "per_sample" in name]


def test_joules_per_token_of_the_users_own_count(tmp_path: Path) -> None:
    mon = monitor(per={"token": lambda batch: batch[0].numel(), "sample": lambda batch: 2 * len(batch[0])})
    trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    summary = mon.summary()
    assert summary["counts"] == {"sample": 64, "token": 128}
    assert summary["joules_per_token"] == summary["train_joules"] / 128
    last = rows(tmp_path / "csv")[-1]
    assert last["energy/joules_per_token"] == pytest.approx(last["energy/train_joules"] / 128)
    assert last["energy/joules_per_sample"] == pytest.approx(last["energy/train_joules"] / 64)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (1.5, TypeError, r"per\['token'\] must return a whole number, got 1.5"),
        (None, TypeError, r"per\['token'\] must return a whole number, got None"),
        (-1, ValueError, r"per\['token'\] must return a number of at least 0, got -1"),
    ],
)
def test_a_count_that_is_no_count(tmp_path: Path, number: Any, error: type[Exception], message: str) -> None:
    mon = monitor(per={"token": lambda batch: number})
    with pytest.raises(error, match=message):
        trainer(tmp_path, mon).fit(Net(), data())
    assert no_thread()
    assert mon.total_joules is not None


class Loaded(ConstantPower):
    """Draws 50 W more from `since_ns` on."""

    since_ns: int | None = None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        now, extra_uj = time.monotonic_ns(), 0
        if self.since_ns is not None:
            extra_uj = (now - self.since_ns) * 50 // 1000
        return {self.device: Reading(now, energy_uj=now * int(self.watts) // 1000 + extra_uj)}


def test_idle_joules_are_told_beside_the_gross_ones(tmp_path: Path) -> None:
    source = Loaded(watts=WATTS)

    class Work(Callback):
        def on_train_start(self, *args: Any) -> None:
            source.since_ns = time.monotonic_ns()

    mon = monitor(source, idle_s=0.02, interval_s=0.005)
    trainer(tmp_path, mon, Work(), logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    summary = mon.summary()
    assert summary["idle"]["watts"] == pytest.approx(WATTS, rel=1e-3)
    covered_s = summary["seconds"] * summary["coverage_ratio"]
    assert summary["idle"]["joules"] == pytest.approx(WATTS * covered_s, rel=1e-3)
    assert summary["idle"]["net_joules"] == pytest.approx(summary["total_joules"] - summary["idle"]["joules"], abs=1e-5)
    assert 50 * 8 * 0.002 * 0.9 < summary["idle"]["net_joules"] < summary["total_joules"] * 0.5
    last = rows(tmp_path / "csv")[-1]
    assert last["energy/net_joules"] == pytest.approx(summary["idle"]["net_joules"], abs=1e-5)
    assert last["energy/total_joules"] == pytest.approx(summary["total_joules"], abs=1e-5)
    assert summary["by_phase"].keys() == {"train"}  # the wait before it is in no figure of the run


def test_a_restart_without_a_baseline_has_no_net_joules(tmp_path: Path) -> None:
    first = monitor(idle_s=0.01)
    run = trainer(tmp_path, first)
    run.fit(Net(), data())
    assert first.summary()["idle"]["net_joules"] is not None
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = monitor()
    trainer(tmp_path, second, max_epochs=2, logger=CSVLogger(tmp_path, "csv", "")).fit(
        Net(), data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert second.summary()["idle"] is None
    assert "energy/net_joules" not in rows(tmp_path / "csv")[-1]


def test_co2_and_cost_are_derived_and_kept_apart(tmp_path: Path) -> None:
    plain, priced = monitor(), monitor(footprint=Footprint(grams_co2_per_kwh=400, price_per_kwh=0.25, pue=1.5))
    for mon, name in ((plain, "plain"), (priced, "priced")):
        trainer(tmp_path, mon, logger=CSVLogger(tmp_path, name, "")).fit(Net(), data())
    assert not [name for row in rows(tmp_path / "plain") for name in row if name.startswith("footprint/")]
    summary, last = priced.summary(), rows(tmp_path / "priced")[-1]
    kwh = summary["total_joules"] / 3.6e6
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"] * summary["coverage_ratio"], rel=1e-4)
    assert summary["footprint"]["grams_co2"] == last["footprint/co2_grams"] == pytest.approx(kwh * 1.5 * 400)
    assert summary["footprint"]["cost"] == last["footprint/cost"] == pytest.approx(kwh * 1.5 * 0.25)


class Dashes(CSVLogger):
    """Some loggers cannot have a slash in a name."""

    group_separator = "-"


def test_every_kind_of_logger(tmp_path: Path) -> None:
    loggers = [Dashes(tmp_path, "dashes", ""), CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer(tmp_path, monitor(), Phases(), logger=loggers).fit(Net(), data())
    slashes = {name for row in rows(tmp_path / "csv") for name in row}
    dashes = {name for row in rows(tmp_path / "dashes") for name in row}
    assert "energy-phase-refinement_joules" in dashes
    assert "power-gpu-0-0_watts" in dashes
    assert dashes == {name.replace("/", "-") for name in slashes}


def test_tensorboard_opens_with_the_energy_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

    mon = EnergyMonitor([ConstantPower(watts=WATTS), "cpu-estimate"], idle_s=0.01)
    logger = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer(tmp_path, mon, Phases(), logger=logger).fit(Net(), data(), data(8))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors(CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts)[:3] == ["Joules", "Joules by phase", "Watts"]
    tags = events.Tags()["scalars"]
    shown = {title: {t for t in tags for p in patterns if re.match(p, t)} for title, patterns in charts.items()}
    assert shown["Joules"] == {"energy/total_joules_estimated", "energy/net_joules_estimated"}
    phases = ("setup", "exploration", "refinement")
    assert shown["Joules by phase"] == {f"energy/phase/{phase}_joules_estimated" for phase in phases}
    assert {"power/total_watts_estimated", "power/gpu_watts"} <= shown["Watts"]
    told = {"energy/seconds", "energy/coverage_ratio", "energy/gaps"}
    assert {t for t in tags if re.match("(energy|power)/", t)} - told == set().union(*shown.values())


def test_a_prometheus_file_is_renewed_at_every_log(tmp_path: Path) -> None:
    path, seen = tmp_path / "estdgm.prom", []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(path.read_text() if path.exists() else "")

    mon = monitor(prometheus=path)
    trainer(tmp_path, mon, Look()).fit(Net(), data())
    values = [float(re.findall(r"^hw_energy_joules_total\{.*\} (.*)$", text, re.M)[0]) for text in seen if text]
    assert values[0] < values[2] < values[4]  # written every second step
    assert f"{mon.total_joules}" in path.read_text()
    assert {p.name for p in tmp_path.iterdir() if "prom" in p.name} == {"estdgm.prom"}


def test_a_prometheus_file_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    mon = monitor(prometheus=tmp_path / "nowhere" / "estdgm.prom")
    with pytest.warns(UserWarning, match="Prometheus file .*nowhere.* cannot be written") as caught:
        trainer(tmp_path, mon).fit(Net(), data())
    assert len([w for w in caught if "Prometheus" in str(w.message)]) == 1
    assert mon.summary()["steps"] == 8


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
