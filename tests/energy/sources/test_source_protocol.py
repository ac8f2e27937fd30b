"""The protocol, discovery, and what holds for every source that is found."""

from __future__ import annotations

import importlib.metadata
import time

import pytest

from helpers.energy_parts import ConstantPower
from lightning_estdgm import _registry
from lightning_estdgm.energy._reading import DeviceInfo, SourceUnavailable, Status
from lightning_estdgm.energy.sources._protocol import ENTRY_POINT_GROUP, EnergySource, check_source, discover, resolve
from lightning_estdgm.energy.sources.cpu_estimate import CpuEstimate

NAMES = [name for name, _ in discover()]


def test_discovery_finds_the_modules_and_puts_counters_first_and_estimates_last() -> None:
    counters = ["amdsmi", "hwmon-intel", "nvml", "rapl", "rocm-smi"]
    known = [*counters, "hwmon-amd", "hwmon-grace", "cpu-estimate"]
    assert [name for name in NAMES if name in known] == known
    methods = [source.method for _, source in discover()]
    assert methods == sorted(methods, key=["counter", "integrated", "estimated"].index)
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
    monkeypatch.setattr(_registry, "entry_points", lambda group: entries if group == ENTRY_POINT_GROUP else [])
    found = dict(discover())
    assert isinstance(found["constant"], ConstantPower)
    assert isinstance(found["broken"], SourceUnavailable)
    assert "no module named vendor" in found["broken"].reason
    assert isinstance(found["odd"], SourceUnavailable)
    assert "lacks name" in found["odd"].reason


def test_the_entry_point_group_is_asked_for() -> None:
    assert _registry.entry_points is importlib.metadata.entry_points
    assert ENTRY_POINT_GROUP == "lightning_estdgm.energy_sources"


def test_resolve_takes_names_and_objects() -> None:
    own = ConstantPower()
    assert resolve(["rapl", own])[1] == ("constant", own)
    assert resolve([]) == []
    assert [name for name, _ in resolve(None)] == NAMES


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["nvlm"], ValueError, "unknown energy source 'nvlm'; known are amdsmi, cpu-estimate, hwmon-amd, .*, nvml"),
        ("nvml", TypeError, r"a list of names and energy sources, got 'nvml': write \['nvml'\]"),
        (5, TypeError, "got 5"),
        ([object()], TypeError, "object lacks name, method, scope"),
        ([CpuEstimate], TypeError, "an instance of an energy source, got the class CpuEstimate: pass CpuEstimate"),
        ([ConstantPower(), ConstantPower()], ValueError, "given twice: constant; name each once"),
        ([ConstantPower(method="guess")], ValueError, "method must be one of .* got 'guess'"),  # type: ignore[arg-type]
        ([ConstantPower(scope="rack")], ValueError, "scope must be 'host' or 'process', got 'rack'"),  # type: ignore[arg-type]
        ([ConstantPower(name="")], ValueError, "non-empty string"),
        ([ConstantPower(update_period_s=-1)], ValueError, "update_period_s must be >= 0, got -1"),
        ([ConstantPower(update_period_s=float("inf"))], ValueError, "update_period_s must be >= 0, got inf"),
    ],
)
def test_bad_sources(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(given)  # type: ignore[arg-type]
