"""The protocol, discovery, and what holds for every source that is found."""

from __future__ import annotations

import importlib.metadata
import pickle
import time
from types import SimpleNamespace

import pytest

import lightning_estdgm.energy as energy
from helpers.energy_parts import ConstantPower
from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, SourceUnavailable, Status, own_gpus, torch_ids
from lightning_estdgm.energy.sources.cpu_estimate import ENVIRONMENT, CpuEstimate
from lightning_estdgm.energy.sources.protocol import EnergySource, check_source, discover, resolve

NAMES = [name for name, _ in discover()]


def test_discovery_finds_the_modules_and_puts_counters_first_and_estimates_last() -> None:
    counters = ["amdsmi", "hwmon-intel", "nvml", "rapl", "rocm-smi"]
    assert [*counters, "hwmon-amd", "hwmon-grace", "cpu-estimate"] == NAMES
    assert all(isinstance(source, EnergySource) for _, source in discover())


@pytest.mark.parametrize("name", NAMES)
def test_a_source_opens_or_says_why_not(name: str) -> None:
    source = dict(discover())[name]
    assert check_source(source) is source
    assert isinstance(source, EnergySource)
    assert source.name == name
    assert not source.devices()
    reason = None
    try:
        source.open()
    except SourceUnavailable as e:
        reason = e
    if reason is not None:
        assert reason.status is not Status.OK
        assert len(reason.reason) > 10
    else:
        devices = source.devices()
        assert devices
        readings = source.read()
        assert set(readings) == set(devices)
        assert all(isinstance(info, DeviceInfo) and info.name for info in devices.values())
        for reading in readings.values():
            assert abs(reading.monotonic_ns - time.monotonic_ns()) < 60e9
            good = reading.energy_uj is not None or reading.power_mw is not None
            assert good == (reading.status is Status.OK)
    source.close()
    source.close()


class Entry:
    """What `importlib.metadata` gives for an installed entry point."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def load(self) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_entry_points_are_found_and_broken_ones_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Entry("constant", ConstantPower),
        Entry("broken", ImportError("no module named vendor")),
        Entry("odd", lambda: 3),
    ]
    monkeypatch.setattr(energy, "entry_points", lambda group: entries if group == energy.ENTRY_POINT_GROUP else [])
    found = dict(discover())
    assert isinstance(found["constant"], ConstantPower)
    assert isinstance(found["broken"], SourceUnavailable)
    assert "no module named vendor" in found["broken"].reason
    assert isinstance(found["odd"], SourceUnavailable)
    assert "lacks name" in found["odd"].reason


def test_the_entry_point_group_is_asked_for() -> None:
    assert energy.entry_points is importlib.metadata.entry_points
    assert energy.ENTRY_POINT_GROUP == "lightning_estdgm.energy_sources"


def test_resolve_takes_names_and_objects() -> None:
    own = ConstantPower()
    assert resolve(["rapl", own])[1] == ("constant", own)
    assert resolve([]) == []
    assert [name for name, _ in resolve(None)] == NAMES


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["nvlm"], ValueError, "unknown energy source 'nvlm'; known are amdsmi, cpu-estimate, hwmon-amd, .*, nvml"),
        ("nvml", TypeError, "a list of names and energy sources, got 'nvml'"),
        (5, TypeError, "got 5"),
        ([object()], TypeError, "object lacks name, method, scope"),
        ([CpuEstimate], TypeError, "an instance of an energy source, got the class CpuEstimate"),
        ([ConstantPower(), ConstantPower()], ValueError, "given twice: constant"),
        ([ConstantPower(method="guess")], ValueError, "method must be one of .* got 'guess'"),  # type: ignore[arg-type]
        ([ConstantPower(scope="rack")], ValueError, "scope must be 'host' or 'process', got 'rack'"),  # type: ignore[arg-type]
        ([ConstantPower(name="")], ValueError, "non-empty string"),
        ([ConstantPower(update_period_s=-1)], ValueError, "update_period_s must be >= 0, got -1"),
    ],
)
def test_bad_sources(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(given)  # type: ignore[arg-type]


def gpu(uid: str) -> DeviceId:
    return DeviceId("host", "gpu", uid)


def test_a_torch_device_finds_the_reading_that_holds_its_energy() -> None:
    infos = {
        gpu("GPU-0f0f"): DeviceInfo("parent", shared=True, pci="0000:01:00.0", ids=("MIG-1a1a", "MIG-2b2b")),
        gpu("GPU-3c3c"): DeviceInfo("whole", pci="0000:02:00.0"),
        gpu("0000:c1:00.0"): DeviceInfo("pair", pci="0000:c1:00.0", ids=("GPU-4d4d", "0000:c6:00.0")),
        DeviceId("host", "cpu", "GPU-3c3c"): DeviceInfo("no GPU"),
    }
    for uuid, pci, expected in [
        ("3C3C", None, ["GPU-3c3c"]),
        ("GPU-3c3c", "0000:01:00.0", ["GPU-3c3c"]),  # a UUID says more than an address
        ("2b2b", None, ["GPU-0f0f"]),
        ("4d4d", None, ["0000:c1:00.0"]),
        ("unknown", "0000:C6:00.0", ["0000:c1:00.0"]),
        ("unknown", "0000:09:00.0", []),
        (None, None, []),
    ]:
        assert [device.uid for device in own_gpus(infos, uuid, pci)] == expected


def test_ids_of_torch_devices() -> None:
    whole = "3c3c3c3c-0000-1111-2222-333333333333"
    assert torch_ids(SimpleNamespace(uuid=whole)) == (whole, None)
    address = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xC1, pci_device_id=2)
    assert torch_ids(address) == (None, "0001:c1:02.0")
    assert torch_ids(SimpleNamespace(pci_bus_id=3)) == (None, None)
    letters = "33643062-3030-3030-6666-666666666666"  # HIP: the letters of its UUID as bytes
    assert torch_ids(SimpleNamespace(uuid=letters)) == ("3d0b0000ffffffff", None)


def test_the_reason_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(SourceUnavailable(Status.NO_PERMISSION, "why")))
    assert (copy.status, copy.reason, str(copy)) == (Status.NO_PERMISSION, "why", "why")


def test_the_cpu_estimate_is_cpu_time_times_watts() -> None:
    source = CpuEstimate(watts_per_core=50.0)
    source.open()
    (before,) = source.read().values()
    start = time.process_time()
    while time.process_time() - start < 0.02:
        pass
    (after,) = source.read().values()
    end = time.process_time()
    assert source.method == "estimated"
    assert before.energy_uj is not None
    assert after.energy_uj is not None
    assert 0.02 * 50 <= (after.energy_uj - before.energy_uj) / 1e6 <= (end - start + 0.02) * 50
    assert "50 W per busy core" in next(iter(source.devices().values())).name


@pytest.mark.parametrize("watts", [0, -1.0, float("nan"), float("inf"), True, "9"])
def test_the_cpu_estimate_refuses_bad_watts(watts: float) -> None:
    with pytest.raises(ValueError, match="watts_per_core must be a positive number of watts, got"):
        CpuEstimate(watts_per_core=watts)


def test_the_cpu_estimate_takes_watts_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "3.5")
    source = CpuEstimate()
    source.open()
    assert "3.5 W per busy core" in next(iter(source.devices().values())).name
    monkeypatch.setenv(ENVIRONMENT, "lots")
    with pytest.raises(SourceUnavailable, match="ESTDGM_WATTS_PER_CORE must be a positive number of watts, got 'lots'"):
        CpuEstimate().open()
