"""`estdgm doctor` and the look at the sensors behind it."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from helpers.energy_parts import ConstantPower, FakeGpu, Machine
from lightning_estdgm._environment import processor_name
from lightning_estdgm.cli import app
from lightning_estdgm.energy import _probe as probe
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy.sources import cpu_estimate, nvml
from lightning_estdgm.energy.sources._protocol import EnergySource
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune import _timing_cache as timing_cache
from lightning_estdgm.sparse.autotune._cases import layer_of
from lightning_estdgm.sparse.autotune._choice import Case, ConvCase
from lightning_estdgm.sparse.autotune._expert_case import ExpertCase
from lightning_estdgm.sparse.autotune._timing import Timing
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache
from lightning_estdgm.tools import _doctor as doctor

Found = list[tuple[str, "EnergySource | SourceUnavailable"]]


class Clock:
    """The time of `probe` and of the sources below: it goes on by what is slept."""

    now_ns = 10**12

    def monotonic_ns(self) -> int:
        self.now_ns += 10_000
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


class Stepping(ConstantPower):
    """A counter that is renewed every `period_s`, and power beside a counter for the other device."""

    def __init__(self, clock: Clock, period_s: float, **fields: object) -> None:
        super().__init__(**fields)  # type: ignore[arg-type]
        self.clock, self.period_ns = clock, round(period_s * 1e9)

    def read(self, devices: Collection[DeviceId] | None = None) -> dict[DeviceId, Reading]:
        if self.raises:
            raise OSError("the bus is gone")
        now_ns = self.clock.monotonic_ns()
        if self.status is not Status.OK:
            return {self.device: Reading(now_ns, status=self.status)}
        renewed_ns = now_ns // self.period_ns * self.period_ns
        if self.method == "integrated":
            return {self.device: Reading(now_ns, power_mw=round(self.watts * 1000))}
        return {self.device: Reading(now_ns, energy_uj=round(renewed_ns * self.watts / 1000))}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(probe, "time", clock)
    return clock


def look(*sources: EnergySource | SourceUnavailable, seconds: float = 1.0) -> probe.Probe:
    return probe.probe([(getattr(s, "name", "gone"), s) for s in sources], seconds)


def named(*sources: EnergySource | SourceUnavailable) -> Found:
    return [(getattr(s, "name", "gone"), s) for s in sources]


def text_of(result: dict[str, object]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.show(result))
    return console.export_text()


def test_watts_and_period_as_seen(clock: Clock) -> None:
    counter = Stepping(clock, 0.1, watts=300.0, name="counter")
    power = Stepping(clock, 0.1, watts=80.0, name="power", method="integrated", uid="p0")
    result = look(counter, power)
    (_, devices), (_, others) = result.sources
    (seen,), (other,) = devices.values(), others.values()
    assert seen.watts == pytest.approx(300, rel=0.11)  # one renewal more or less in the second
    assert seen.period_s == pytest.approx(0.1, rel=0.03)  # as exact as the 2 ms between two looks
    assert other.watts == pytest.approx(80, rel=1e-3)
    assert other.period_s is None  # it never changed
    assert seen.reads == other.reads > 100
    assert (seen.failed, seen.status) == (0, Status.OK)
    assert result.measurable
    assert result.kinds(estimated=False) == {"gpu": "counter, power"}
    assert counter.events[-1] == "close"


def test_what_fails_has_no_watts_and_is_not_measured(clock: Clock) -> None:
    broken = Stepping(clock, 0.1, name="broken", raises=True)
    silent = Stepping(clock, 0.1, name="silent", uid="s0", status=Status.NO_PERMISSION)
    result = look(broken, silent, SourceUnavailable(Status.NO_PERMISSION, "chmod it"))
    seen = [device for _, devices in result.sources for device in devices.values()]
    assert [(s.watts, s.period_s, s.status) for s in seen] == [
        (None, None, Status.ERROR),
        (None, None, Status.NO_PERMISSION),
    ]
    assert all(s.failed == s.reads >= 2 for s in seen)
    assert not result.measurable
    assert [(a.name, a.status, a.reason) for a in result.unavailable] == [("gone", Status.NO_PERMISSION, "chmod it")]


def test_an_estimate_is_no_measurement(clock: Clock) -> None:
    guess = Stepping(clock, 0.1, name="guess", method="estimated", kind="cpu")
    result = look(guess)
    assert not result.measurable
    assert result.kinds(estimated=True) == {"cpu": "guess"}
    assert result.kinds(estimated=False) == {}


def test_a_module_counter_measures_what_it_covers(clock: Clock) -> None:
    module = Stepping(clock, 0.1, info=DeviceInfo("module", covers=("cpu", "dram")))
    assert look(module).kinds(estimated=False) == dict.fromkeys(("gpu", "cpu", "dram"), "constant")


def test_two_sources_of_one_device_are_read_once(clock: Clock) -> None:
    first, second = Stepping(clock, 0.1, name="first"), Stepping(clock, 0.1, name="second")
    result = look(first, second)
    assert [opened.name for opened, _ in result.sources] == ["first"]
    assert [(a.name, a.reason) for a in result.unavailable] == [("second", "another source reads the same devices")]


def test_a_look_takes_time() -> None:
    with pytest.raises(ValueError, match="seconds must be > 0, got 0"):
        look(seconds=0)


@pytest.fixture
def sensors(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Found]:
    """What the doctor finds: the last list of these."""
    found: list[Found] = []

    def resolve(sources: Iterable[str | EnergySource] | None) -> Found:
        assert sources is None
        return found[-1]

    monkeypatch.setattr(doctor, "resolve", resolve)
    return found


def test_the_answer_for_people(sensors: list[Found], clock: Clock) -> None:
    shared = DeviceInfo("Parent GPU", shared=True, covers=("cpu",), pci="0000:c1:00.0", ids=("MIG-1",))
    sensors.append(
        named(
            Stepping(clock, 0.1, name="vendor", uid="GPU-1", info=shared),
            Stepping(clock, 0.1, name="guess", method="estimated", kind="dram", uid="d0"),
            SourceUnavailable(Status.NO_PERMISSION, "may not: chmod [it]"),
        )
    )
    result = doctor.diagnose(0.5)
    assert result["verdict"] == (
        "Energy can be measured here: gpu by vendor, cpu by vendor. Only estimated: dram by guess."
    )
    text = text_of(result)
    for part in (
        result["verdict"],
        "Parent GPU [shared, holds cpu too]",
        "GPU-1",
        "0000:c1:00.0",
        "MIG-1",
        "constant 1.0",
        "ESTIMATED",
        "no_permission",
        "may not: chmod [it]",
        "backend cpu on cpu",
    ):
        assert part in text
    assert json.loads(json.dumps(result)) == result


def test_the_answer_where_there_is_nothing(sensors: list[Found]) -> None:
    sensors.append([])
    result = doctor.diagnose(0.01)
    assert not result["measurable"]
    assert result["verdict"].startswith("Energy CANNOT be measured here. Below:")
    assert "CANNOT" in text_of(result)


def test_the_command_exits_with_1_where_energy_is_only_estimated(sensors: list[Found]) -> None:
    sensors.append(named(cpu_estimate.CpuEstimate(), SourceUnavailable(Status.UNAVAILABLE, "no driver")))
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == 1
    assert "Energy CANNOT be measured here. It is only estimated: cpu by cpu-estimate." in " ".join(
        outcome.output.split()
    )
    assert "no driver" in outcome.output


def test_the_command_exits_with_0_where_energy_is_measured(sensors: list[Found], machine: Machine) -> None:
    machine.show(FakeGpu("GPU-a", watts=300), FakeGpu("GPU-b", energy=3, mw=90_000))
    sensors.append(named(nvml.Nvml()))
    outcome = CliRunner().invoke(app, ["doctor", "--json"])
    assert outcome.exit_code == 0
    result = json.loads(outcome.output)
    assert result["measurable"]
    assert set(result) == {
        "measurable", "verdict", "seconds", "sources", "absent", "torch_devices", "backends", "choices",
        "environment",
    }  # fmt: skip
    (source,) = result["sources"]
    assert (source["name"], source["driver"]) == ("nvml", "nvidia 999.1")
    watts = {device["uid"]: device["watts"] for device in source["devices"]}
    assert watts["GPU-b"] == pytest.approx(90, rel=1e-3)
    assert watts["GPU-a"] == pytest.approx(300, rel=0.5)  # read by a real clock on a machine that may be busy
    assert all(device["status"] == "ok" for device in source["devices"])
    assert {row["name"] for row in result["backends"]} >= {"cpu", "reference"}
    assert result["environment"]["torch"]


# ----------------------------------------------------------------------------------------- measured layers


CPU = torch.device("cpu")
LINEAR = Case(2048, 1024, 512, 64, 0.125, torch.float32, CPU)
CONV = ConvCase(32, 28, 14, 256, 128, ConvGeometry((3, 3), (2, 2), (1, 1)), 32, 0.25, torch.bfloat16, CPU)


def test_a_stack_of_experts_is_put_in_words() -> None:
    case = ExpertCase(2048, 1024, 512, 64, 0.125, torch.float32, CPU, transposed=True, experts=8, dense="loop")
    words = "8 experts of 1024 x 512, 2048 tokens in all, loop if dense, stored (in, out)"
    assert doctor.layer_words(layer_of(case)) == words


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What this machine has measured; beside it what it has with other threads, in other versions, and another CPU."""
    monkeypatch.setenv(timing_cache.ENVIRONMENT, str(tmp_path))
    for name, value in (("package_version", "0.0"), ("processor_name", "Another CPU"), ("", "")):
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(timing_cache, name, lambda *args, value=value: value)
            TimingCache().add(LINEAR, {"dense": 9e-3, "cpu": 4e-3, "native": 3e-3})
    TimingCache().add(CONV, Timing({"dense": [2e-3], "cpu": [5e-3]}, own_share=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        TimingCache().add(CONV, {"dense": 1e-3, "cpu": 0.5e-3})
    return tmp_path


def test_measured_layers_are_shown(sensors: list[Found], kept: Path) -> None:
    sensors.append([])
    result = doctor.diagnose(0.01)
    assert json.loads(json.dumps(result)) == result
    choices = result["choices"]
    assert choices["folder"] == str(kept)
    used = [file for file in choices["files"] if file["of_these_versions"]]
    assert sorted(file["machine"]["threads"] for file in used) == sorted([torch.get_num_threads(), 64])
    assert len(choices["files"]) == 3  # nothing of the other CPU
    rows = [row for file in used for row in file["choices"]]
    assert sorted((row["layer"]["block_size"], row["backend"], row["dense_s"], row["sparse_s"]) for row in rows) == [
        (32, "cpu", 1e-3, 0.5e-3),
        (32, "dense", 2e-3, 5e-3),
        (64, "native", 9e-3, 3e-3),
    ]
    text = text_of(result)
    for part in (
        "1024 x 512, 2048 tokens",
        "256 x 128 x 3x3 stride 2x2 padding 1x1, 32 images of 28x14, channels last",
        "bfloat16",
        "0.125",
        "64 thread(s)",
        "Z, busy",
        f"Not used: 1 layers of other versions, 1 files in {kept}",
        *(file["path"] for file in used),
    ):
        assert part in text


def test_remeasure_drops_what_is_known_of_this_machine_and_nothing_else(sensors: list[Found], kept: Path) -> None:
    sensors.append([])
    (kept / f"choices.{timing_cache._slug(processor_name())}.broken.json").write_text("{")
    outcome = CliRunner().invoke(app, ["doctor", "--remeasure", "--json"])
    assert outcome.exit_code == 1  # as without: nothing measures energy here
    choices = json.loads(outcome.output)["choices"]
    assert len(choices["dropped"]) == 4
    assert choices["files"] == []
    assert [path.name.split(".")[1] for path in kept.glob("*.json")] == ["another-cpu"]
    assert TimingCache().of(LINEAR) == []


def test_without_measurements_it_says_so(sensors: list[Found], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sensors.append([])
    assert "Measured layers are not kept: ESTDGM_CHOICES=off" in text_of(doctor.diagnose(0.01))
    monkeypatch.setenv(timing_cache.ENVIRONMENT, str(tmp_path / "none"))
    assert f"would be kept in {tmp_path / 'none'}" in text_of(doctor.diagnose(0.01))
