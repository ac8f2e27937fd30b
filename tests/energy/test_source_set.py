"""The choice of what each source reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import pytest

from helpers.energy_parts import NEVER_S, ConstantPower, started_sampler
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy._sampler import Sampler

GPU = DeviceId("host", "gpu", "c0")


def test_absent_sources_say_why() -> None:
    sampler = started_sampler(ConstantPower(absent=SourceUnavailable(Status.NO_PERMISSION, "ask root")))
    sampler.stop()
    assert [(a.name, a.status, a.reason) for a in sampler.unavailable] == [
        ("constant", Status.NO_PERMISSION, "ask root")
    ]
    assert sampler.active == []
    assert sampler.totals().joules() is None


def test_an_estimate_gives_way_to_a_measurement_of_its_kind() -> None:
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p")
    rapl = ConstantPower(name="rapl", kind="cpu", uid="package-0")
    sampler = started_sampler(guess, rapl)
    sampler.stop()
    assert [o.name for o in sampler.active] == ["rapl"]
    assert [(a.name, a.reason) for a in sampler.unavailable] == [("guess", "not needed: cpu is measured by rapl")]
    gpu = ConstantPower(name="gpu")
    sampler = started_sampler(ConstantPower(name="guess", method="estimated", kind="cpu", uid="p"), gpu)
    sampler.stop()
    assert [o.name for o in sampler.active] == ["gpu", "guess"]


def test_an_estimate_gives_way_even_where_another_process_reads() -> None:
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p", scope="process")
    rapl = ConstantPower(name="rapl", kind="cpu", uid="package-0")
    sampler = started_sampler(guess, rapl, select=lambda source, devices: [] if source.scope == "host" else devices)
    sampler.stop()
    assert sampler.active == []
    assert {a.name for a in sampler.unavailable} == {"guess", "rapl"}


def test_a_device_that_two_sources_offer_is_read_once() -> None:
    sampler = started_sampler(ConstantPower(name="a"), ConstantPower(name="b"))
    sampler.stop()
    assert [o.name for o in sampler.active] == ["a"]
    assert "another source" in sampler.unavailable[0].reason


def test_a_module_counter_leaves_out_what_it_holds_already() -> None:
    module = ConstantPower(name="module", uid="m", info=DeviceInfo("Grace Hopper module", covers=("cpu", "dram")))
    package = ConstantPower(name="package", kind="cpu", uid="package-0")
    memory = ConstantPower(name="memory", kind="dram", uid="package-0/dram")
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p", scope="process")
    sampler = started_sampler(package, memory, guess, module)  # whatever the order
    sampler.stop()
    assert [o.name for o in sampler.active] == ["module"]
    assert {a.name: a.reason for a in sampler.unavailable} == {
        "package": "it would count twice: cpu is in the readings of module",
        "memory": "it would count twice: dram is in the readings of module",
        "guess": "not needed: cpu is measured by module",
    }
    assert all(source.events[-1] == "close" for source in (package, memory, guess, module))


def test_what_other_processes_read_is_closed() -> None:
    ours, theirs = ConstantPower(name="ours"), ConstantPower(name="theirs", uid="c1")
    sampler = Sampler([("ours", ours), ("theirs", theirs)], interval_s=NEVER_S)
    sampler.open()
    sampler.keep([source for source in sampler.active if source.name == "ours"])
    sampler.start("train", "train")
    sampler.stop()
    assert theirs.events == ["open", "close"]
    assert [o.name for o in sampler.active] == ["ours"]
    assert [(a.name, a.reason) for a in sampler.unavailable] == [("theirs", "read by another process of this run")]


def test_of_a_source_with_several_devices_only_those_kept_are_read() -> None:
    asked: list[set[DeviceId]] = []

    class Two(ConstantPower):
        other = DeviceId("host", "gpu", "c1")

        def devices(self) -> Mapping[DeviceId, DeviceInfo]:
            return {**super().devices(), self.other: DeviceInfo("the other")}

        def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
            asked.append(set(devices or ()))
            return super().read()

    source = Two()
    sampler = Sampler([("two", source)], interval_s=NEVER_S)
    sampler.open()
    (both,) = sampler.active
    assert set(both.devices) == {source.device, source.other}
    sampler.keep([replace(both, devices={source.device: both.devices[source.device]})])
    sampler.start("train", "train")
    sampler.stop()
    assert asked == [{source.device}] * 2


def test_a_source_with_a_wrap_range_that_makes_no_sense_is_absent() -> None:
    class Odd(ConstantPower):
        def wrap_range_uj(self, device: DeviceId) -> int | None:
            return 0

    source = Odd()
    sampler = started_sampler(source)
    sampler.stop()
    assert "wrap_range_uj must be > 0 or None, got 0" in sampler.unavailable[0].reason
    assert source.events == ["open", "close"]


@pytest.mark.parametrize(
    ("devices", "update_period_s", "reason"),
    [
        ({GPU: "rail"}, 0.0, "TypeError: devices must be {DeviceId: DeviceInfo}, got .*'rail'"),
        ({"c0": DeviceInfo("rail")}, 0.0, "TypeError: devices must be {DeviceId: DeviceInfo}, got {'c0'"),
        ({GPU: DeviceInfo("rail", covers=("npu",))}, 0.0, "ValueError: .*covers must be kinds"),  # type: ignore[arg-type]
        ({GPU: DeviceInfo("rail", covers=None)}, 0.0, "TypeError"),  # type: ignore[arg-type]
        ({DeviceId("h", "gpu", UUID(int=7)): DeviceInfo("rail")}, 0.0, "TypeError: host, kind and uid"),  # type: ignore[arg-type]
        ({GPU: DeviceInfo("rail")}, None, "ValueError: .*update_period_s must be >= 0, got None"),
    ],
)
def test_a_source_that_describes_itself_wrongly_once_open_is_absent(
    devices: Any, update_period_s: Any, reason: str
) -> None:
    @dataclass
    class Odd(ConstantPower):
        def open(self) -> None:
            super().open()
            self.update_period_s = update_period_s

        def devices(self) -> Mapping[DeviceId, DeviceInfo]:
            return devices

    source = Odd()
    sampler = started_sampler(source)
    sampler.stop()
    assert re.match(reason, sampler.unavailable[0].reason)
    assert source.events == ["open", "close"]
