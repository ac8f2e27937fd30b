"""hwmon trees as the kernel shows them: AMD and Intel cards, Grace sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.hwmon_tree import amd_card, card, grace
from lightning_estdgm.energy import _hwmon
from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._hwmon import HwmonSensors
from lightning_estdgm.energy._reading import SourceUnavailable, Status
from lightning_estdgm.energy.sources.hwmon_amd import AmdHwmon
from lightning_estdgm.energy.sources.hwmon_grace import GraceHwmon
from lightning_estdgm.energy.sources.hwmon_intel import IntelHwmon

A, B, C = "0000:03:00.0", "0000:83:00.0", "0000:c3:00.0"


def opened(source: HwmonSensors) -> HwmonSensors:
    source.open()
    return source


def refusal(source: HwmonSensors) -> SourceUnavailable:
    with pytest.raises(SourceUnavailable) as caught:
        source.open()
    return caught.value


def uids(source: HwmonSensors) -> list[str]:
    return [device.uid for device in source.devices()]


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_amd_cards_give_power_by_pci_address(tmp_path: Path) -> None:
    amd_card(tmp_path, "card0", A, unique="1122334455667788")
    amd_card(tmp_path, "card1", B, power1_input=95_500_000)
    card(tmp_path, "card2", "0000:00:02.0", "i915", energy1_input=7)
    source = opened(AmdHwmon(tmp_path, tmp_path / "kfd"))
    assert uids(source) == [A, B]
    assert [r.power_mw for r in source.read().values()] == [180_000, 95_500]
    assert [r.power_mw for r in source.read(list(source.devices())[1:]).values()] == [95_500]
    infos = list(source.devices().values())
    assert "averaged power" in infos[0].name
    assert "momentary power" in infos[1].name
    assert (infos[0].pci, infos[0].ids) == (A, ("GPU-1122334455667788",))
    assert (source.method, source.driver) == ("integrated", "amdgpu")
    assert {source.wrap_range_uj(device) for device in source.devices()} == {None}
    source.close()
    assert source.read() == {}


def test_the_average_is_preferred_and_a_silent_one_passed_over(tmp_path: Path) -> None:
    amd_card(tmp_path, "card0", A, power1_average=150_000_000, power1_input=900_000_000)
    amd_card(tmp_path, "card1", B, power1_average=0, power1_input=140_000_000)
    assert [r.power_mw for r in opened(AmdHwmon(tmp_path, tmp_path)).read().values()] == [150_000, 140_000]


def test_a_gpu_inside_the_cpu_is_left_to_rapl(tmp_path: Path) -> None:
    amd_card(tmp_path, "card0", A, metrics=2)
    refused = refusal(AmdHwmon(tmp_path, tmp_path))
    assert refused.status is Status.UNSUPPORTED
    assert "RAPL" in refused.reason
    amd_card(tmp_path, "card1", B)
    assert uids(opened(AmdHwmon(tmp_path, tmp_path))) == [B]


def test_the_silent_die_of_a_pair_is_read_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amd_card(tmp_path, "card0", A)
    amd_card(tmp_path, "card1", B, unique="b" * 16, power1_average=0, power1_input=0)
    amd_card(tmp_path, "card2", C)
    source = opened(AmdHwmon(tmp_path, tmp_path))
    assert uids(source) == [A, C]
    pair, single = source.devices().values()
    assert (pair.shared, pair.ids) == (True, (B, "GPU-" + "b" * 16))
    assert not single.shared
    for index, expected in (("0", A), ("1", A), ("2", C)):  # HIP counts the silent die too
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", index)
        assert uids(opened(AmdHwmon(tmp_path, tmp_path))) == [expected]


def test_a_gpu_that_shows_nothing_has_no_sensor(tmp_path: Path) -> None:
    amd_card(tmp_path, "card0", A, power1_average=0)
    amd_card(tmp_path, "card1", B, temp1_input=40)
    assert "has a power sensor" in refusal(AmdHwmon(tmp_path, tmp_path)).reason


def test_hidden_amd_cards_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amd_card(tmp_path, "card0", A)
    amd_card(tmp_path, "card1", B)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert uids(opened(AmdHwmon(tmp_path, tmp_path / "kfd"))) == [B]
    node = tmp_path / "kfd" / "1"
    node.mkdir(parents=True)
    (node / "properties").write_text(f"simd_count 4\nlocation_id {0x83 << 8}\n")
    assert uids(opened(AmdHwmon(tmp_path, tmp_path / "kfd"))) == [A]  # the kernel puts B first
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert "is visible to this process" in refusal(AmdHwmon(tmp_path, tmp_path / "kfd")).reason


def test_intel_cards_give_energy_once(tmp_path: Path) -> None:
    card(tmp_path, "card0", A, "i915", energy1_input=5_000_000)
    card(tmp_path, "card0", A, "i915_gt0", "hwmon4", energy1_input=4_000_000)  # a tile, inside the card
    card(tmp_path, "card1", B, "xe", "hwmon5", energy1_input=8_000_000, energy2_input=6_000_000)
    source = opened(IntelHwmon(tmp_path))
    assert uids(source) == [A, B]
    assert [r.energy_uj for r in source.read().values()] == [5_000_000, 8_000_000]
    assert (source.method, source.driver) == ("counter", "i915, xe")
    assert all("energy counter of the card" in info.name for info in source.devices().values())


def test_the_package_of_an_intel_card_serves_where_the_card_has_no_counter(tmp_path: Path) -> None:
    card(tmp_path, "card0", A, "xe", energy2_input=6_000_000)
    source = opened(IntelHwmon(tmp_path))
    assert [r.energy_uj for r in source.read().values()] == [6_000_000]
    assert "package" in next(iter(source.devices().values())).name


def test_an_integrated_intel_gpu_has_no_counter(tmp_path: Path) -> None:
    card(tmp_path, "card0", A, "i915", temp1_input=40)
    assert refusal(IntelHwmon(tmp_path)).status is Status.UNSUPPORTED


@pytest.mark.parametrize("make", [AmdHwmon, IntelHwmon])
def test_no_graphics(make: type[AmdHwmon] | type[IntelHwmon], tmp_path: Path) -> None:
    assert "does not exist" in refusal(make(tmp_path / "none")).reason
    assert "shows no card of the driver" in refusal(make(tmp_path)).reason
    (tmp_path / "card0").mkdir()
    (tmp_path / "card0" / "device").symlink_to(tmp_path / "masked")
    refused = refusal(make(tmp_path))
    assert refused.status is Status.UNAVAILABLE
    assert "a container runtime masks them; mount /sys into it" in refused.reason


def test_a_sensor_that_vanishes_or_fails_is_a_gap_and_never_0(tmp_path: Path) -> None:
    folder = amd_card(tmp_path, "card0", A)
    source = opened(AmdHwmon(tmp_path, tmp_path))
    no_power = ("0", "-5", "no number", "65535000000", str((2**32 - 1) * 1000))
    for text, status in [(text, Status.ERROR) for text in no_power]:
        (folder / "power1_average").write_text(f"{text}\n")
        assert [(r.power_mw, r.status) for r in source.read().values()] == [(None, status)]
    (folder / "power1_average").unlink()
    assert [(r.power_mw, r.status) for r in source.read().values()] == [(None, Status.UNAVAILABLE)]
    (folder / "power1_average").write_text("90000000\n")
    assert [r.power_mw for r in source.read().values()] == [90_000]


def test_an_unreadable_sensor_comes_with_the_fix(open_folder: Path, forbid: Callable[[Path], None]) -> None:
    folder = card(open_folder, "card0", A, "xe", energy1_input=5)
    forbid(folder / "energy1_input")
    refused = refusal(IntelHwmon(open_folder))
    assert refused.status is Status.NO_PERMISSION
    assert f"chmod a+r {open_folder}" in refused.reason


@pytest.mark.parametrize("make", [AmdHwmon, IntelHwmon])
def test_a_folder_that_may_not_be_listed(
    make: type[AmdHwmon] | type[IntelHwmon], open_folder: Path, forbid: Callable[[Path], None]
) -> None:
    forbid(open_folder)
    refused = refusal(make(open_folder))
    assert refused.status is Status.NO_PERMISSION
    assert "cannot be listed" in refused.reason


def test_a_permission_that_is_lost_is_a_gap(open_folder: Path, forbid: Callable[[Path], None]) -> None:
    folder = card(open_folder, "card0", A, "xe", energy1_input=5)
    source = opened(IntelHwmon(open_folder))
    forbid(folder / "energy1_input")
    assert [(r.energy_uj, r.status) for r in source.read().values()] == [(None, Status.NO_PERMISSION)]


def test_grace_sockets_with_memory(tmp_path: Path) -> None:
    grace(tmp_path, "hwmon1", "Module Power Socket 0", 600_000_000)
    grace(tmp_path, "hwmon2", "CPU Power Socket 0", 90_000_000)
    grace(tmp_path, "hwmon3", "Grace Power Socket 0", 150_000_000)
    grace(tmp_path, "hwmon4", "SysIO Power Socket 0", 10_000_000)
    grace(tmp_path, "hwmon5", "CPU Power Socket 1", 80_000_000)  # this socket has the rail alone
    source = opened(GraceHwmon(tmp_path))
    assert {device.uid: device.kind for device in source.devices()} == {"grace-0": "cpu", "grace-1": "cpu"}
    assert [r.power_mw for r in source.read().values()] == [150_000, 80_000]
    assert [info.covers for info in source.devices().values()] == [("dram",), ()]
    assert "with memory" in next(iter(source.devices().values())).name


def test_no_grace(tmp_path: Path) -> None:
    grace(tmp_path, "hwmon1", "Node Power", 600_000_000)
    assert "no power meter of a Grace socket" in refusal(GraceHwmon(tmp_path)).reason


def test_power_is_integrated_and_a_counter_is_not(tmp_path: Path) -> None:
    folder = amd_card(tmp_path, "card0", A, power1_average=100_000_000)
    other = card(tmp_path, "card1", B, "xe", "hwmon5", energy1_input=1_000_000)
    power, energy = opened(AmdHwmon(tmp_path, tmp_path)), opened(IntelHwmon(tmp_path))
    accumulator = Accumulator()
    for source in (power, energy):
        (device,) = source.devices()
        accumulator.add_device(device, source=source.name, method=source.method)
    readings = {**power.read(), **energy.read()}
    start_ns = max(r.monotonic_ns for r in readings.values())
    accumulator.switch(start_ns, "train", "train")
    accumulator.update(start_ns, readings)
    (folder / "power1_average").write_text("300000000\n")
    (other / "energy1_input").write_text("4000000\n")
    after = {**power.read(), **energy.read()}
    accumulator.update(max(r.monotonic_ns for r in after.values()), after)
    (device,) = power.devices()
    span_ns = after[device].monotonic_ns - readings[device].monotonic_ns
    uj = {cell.source: uj for cell, uj in accumulator.totals().energy_uj.items()}
    assert uj == {"hwmon-amd": (100_000 + 300_000) * span_ns // 2_000_000, "hwmon-intel": 3_000_000}


def test_an_intel_counter_that_stands_still_or_jumps_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = card(tmp_path, "card0", A, "xe", energy1_input=5_000_000) / "energy1_input"
    source, clock = opened(IntelHwmon(tmp_path)), 10**9
    monkeypatch.setattr(_hwmon.time, "monotonic_ns", lambda: clock)
    statuses = []
    for seconds, energy_uj in ((0, 5_000_000), (1, 105_000_000), (1, 105_000_000), (1, 205_000_000), (1, 4 * 10**12)):
        clock += seconds * 10**9
        path.write_text(f"{energy_uj}\n")
        (reading,) = source.read().values()
        assert (reading.energy_uj is None) == (reading.status is not Status.OK)
        statuses.append(reading.status)
    ok, bad = Status.OK, Status.UNAVAILABLE
    assert statuses == [ok, ok, bad, ok, bad]


def test_a_driver_that_was_loaded_again_numbers_anew_and_is_found(tmp_path: Path) -> None:
    folder = amd_card(tmp_path, "card0", A)
    source = opened(AmdHwmon(tmp_path, tmp_path))
    folder.rename(folder.with_name("hwmon9"))
    assert [r.status for r in source.read().values()] == [Status.UNAVAILABLE]
    assert [r.power_mw for r in source.read().values()] == [180_000]
    assert uids(source) == [A]
