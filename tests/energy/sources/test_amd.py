"""amdsmi (the real package) and ROCm-SMI on a stand-in library with the real interface."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.energy_parts import AmdMachine, FakeAmd, forget_amdsmi
from helpers.hwmon_tree import amd_card
from lightning_estdgm.energy import _amd_gpus as amd_module
from lightning_estdgm.energy._amd_gpus import AmdGpus, ticks_to_uj, valid
from lightning_estdgm.energy._amd_visibility import hip_order
from lightning_estdgm.energy._reading import SourceUnavailable, Status, own_gpus, torch_ids
from lightning_estdgm.energy.sources import amdsmi, rocm_smi
from lightning_estdgm.energy.sources._protocol import resolve
from lightning_estdgm.energy.sources.hwmon_amd import AmdHwmon

A, B, C, D = (f"0000:{bus}:00.0" for bus in ("0c", "22", "9f", "c1"))
IDS = {A: "aaaaaaaaaaaaaaaa", B: "bbbbbbbbbbbbbbbb", C: "cccccccccccccccc", D: "dddddddddddddddd"}

LIBRARIES = [amdsmi.SOURCE, rocm_smi.SOURCE]
both = pytest.mark.parametrize("make", LIBRARIES, ids=["amdsmi", "rocm-smi"])
Make = Callable[[], AmdGpus]


def opened(make: Make) -> AmdGpus:
    source = make()
    source.open()
    return source


def uids(source: AmdGpus) -> list[str]:
    return [device.uid for device in source.devices()]


def refusal(make: Make) -> SourceUnavailable:
    with pytest.raises(SourceUnavailable) as caught:
        make().open()
    return caught.value


@both
def test_the_accumulator_is_counted_in_exact_units(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(D, watts=500, unique=IDS[D]))
    source = opened(make)
    (device,) = source.devices()
    assert (device.kind, device.uid, source.method) == ("gpu", D, "counter")
    info = source.devices()[device]
    assert "MI300X" in info.name
    assert "energy counter" in info.name
    assert (info.pci, info.shared, info.covers) == (D, False, ())
    assert f"GPU-{IDS[D]}" in info.ids
    assert source.driver == "amdgpu 6.12.12"
    assert source.wrap_range_uj(device) is None
    amd_machine.show(FakeAmd(D, ticks=3 * 65536, watts=0))
    reading = source.read()[device]
    assert (reading.energy_uj, reading.power_mw, reading.status) == (3_000_000, None, Status.OK)
    source.close()
    source.close()
    assert source.read() == {}


@pytest.mark.parametrize(("make", "lost"), [(amdsmi.SOURCE, 31), (rocm_smi.SOURCE, 10)], ids=["amdsmi", "rocm-smi"])
def test_a_lost_gpu_leaves_the_others(amd_machine: AmdMachine, make: Make, lost: int) -> None:
    amd_machine.show(FakeAmd(A, watts=400), FakeAmd(B, energy=lost))
    assert uids(opened(make)) == [A]
    amd_machine.show(FakeAmd(A, watts=400), FakeAmd(B, watts=400))
    source = opened(make)
    assert uids(source) == [A, B]
    amd_machine.show(FakeAmd(A, energy=lost), FakeAmd(B, watts=400))  # in mid-run
    statuses = {device.uid: reading.status for device, reading in source.read().items()}
    assert statuses == {A: Status.UNAVAILABLE, B: Status.OK}
    amd_machine.show(FakeAmd(A, energy=lost), FakeAmd(B, energy=lost))
    assert refusal(make).status is Status.UNAVAILABLE


def test_units() -> None:
    assert ticks_to_uj(1_000_000_000, 15.3) == 15_258_789_062  # by the rounded 15.3 it would be 0.27 % more
    assert ticks_to_uj(1_000, 1.0) == 1_000
    assert [valid(v) for v in (0, 300, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF, "N/A", None, True, -1)] == [
        0, 300, None, None, None, None, None, None, None,
    ]  # fmt: skip


@both
@pytest.mark.parametrize(
    ("gpu", "expected_mw"),
    [
        (FakeAmd(energy=2, current=310), 310_000),
        (FakeAmd(energy=2, current=0xFFFF, average=250), 250_000),
        (FakeAmd(energy=2, current=0, average=240), 240_000),
    ],
)
def test_without_a_counter_power_is_read(amd_machine: AmdMachine, make: Make, gpu: FakeAmd, expected_mw: int) -> None:
    amd_machine.show(gpu)
    source = opened(make)
    assert source.method == "integrated"
    assert [(r.power_mw, r.energy_uj) for r in source.read().values()] == [(expected_mw, None)]


@both
def test_a_counter_that_stands_still_is_passed_over_for_power(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(A, watts=0, current=300), FakeAmd(B, watts=400))
    source = opened(make)
    assert source.method == "integrated"
    infos = {device.uid: info.name for device, info in source.devices().items()}
    assert "power (its energy counter stands still)" in infos[A]
    assert "energy counter" in infos[B]
    readings = {device.uid: reading for device, reading in source.read().items()}
    assert (readings[A].power_mw, readings[A].energy_uj) == (300_000, None)
    assert readings[B].energy_uj is not None


@both
def test_a_counter_that_stops_in_mid_run_is_a_gap_and_said_once(
    amd_machine: AmdMachine, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    amd_machine.show(FakeAmd(A, watts=400))
    source = opened(make)
    clock = time.monotonic_ns()
    monkeypatch.setattr(amd_module.time, "monotonic_ns", lambda: clock)

    def read(after_s: float, gpu: FakeAmd) -> Status:
        nonlocal clock
        clock += round(after_s * 1e9)
        amd_machine.show(gpu)
        (reading,) = source.read().values()
        assert (reading.energy_uj is None) == (reading.status is not Status.OK)
        return reading.status

    with caplog.at_level(logging.WARNING):
        assert read(1, FakeAmd(A, ticks=10**9, watts=0)) is Status.OK
        assert read(0.1, FakeAmd(A, ticks=10**9, watts=0)) is Status.OK  # not renewed yet
        assert read(1, FakeAmd(A, ticks=10**9, watts=0)) is Status.UNAVAILABLE
        assert read(1, FakeAmd(A, ticks=10**9, watts=0, power=1)) is Status.UNAVAILABLE
        assert read(1, FakeAmd(A, ticks=10**9 + 65536, watts=0)) is Status.OK  # it counts again
        assert read(1, FakeAmd(A, ticks=10**9, watts=0)) is Status.OK  # backwards: the accumulator's gap
        assert read(1, FakeAmd(A, ticks=10**12, watts=0)) is Status.UNAVAILABLE  # 15 MJ in a second
        assert read(1, FakeAmd(A, ticks=10**12 + 65536, watts=0)) is Status.OK
    assert [r.getMessage() for r in caplog.records] == [
        f"The energy counter of AMD Instinct MI300X at {A} stands still while it draws 490 W: "
        "not counted, shown as a gap."
    ]


@pytest.mark.parametrize(
    ("make", "code", "status"),
    [
        (amdsmi.SOURCE, 2, Status.UNSUPPORTED),
        (amdsmi.SOURCE, 10, Status.NO_PERMISSION),
        (amdsmi.SOURCE, 30, Status.ERROR),
        (amdsmi.SOURCE, 8, Status.ERROR),
        (amdsmi.SOURCE, 9, Status.ERROR),
        (amdsmi.SOURCE, 34, Status.UNAVAILABLE),
        (rocm_smi.SOURCE, 2, Status.UNSUPPORTED),
        (rocm_smi.SOURCE, 4, Status.NO_PERMISSION),
        (rocm_smi.SOURCE, 16, Status.ERROR),
        (rocm_smi.SOURCE, 10, Status.UNAVAILABLE),
    ],
)
def test_a_failed_read_is_a_status_and_heals(amd_machine: AmdMachine, make: Make, code: int, status: Status) -> None:
    amd_machine.show(FakeAmd())
    source = opened(make)
    amd_machine.show(FakeAmd(energy=code))
    (reading,) = source.read().values()
    assert (reading.energy_uj, reading.power_mw, reading.status) == (None, None, status)
    amd_machine.show(FakeAmd())
    (reading,) = source.read().values()
    assert reading.status is Status.OK


@both
@pytest.mark.parametrize("ticks", [0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF])
def test_no_value_is_no_energy(amd_machine: AmdMachine, make: Make, ticks: int) -> None:
    amd_machine.show(FakeAmd())
    source = opened(make)
    amd_machine.show(FakeAmd(ticks=ticks, watts=0))
    assert [(r.energy_uj, r.status) for r in source.read().values()] == [(None, Status.ERROR)]


@both
def test_0_w_and_65535_w_are_no_readings(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(energy=2, current=200))
    source = opened(make)
    for current, average in ((0, 0), (0xFFFF, 0), (0xFFFF, 0xFFFF)):
        amd_machine.show(FakeAmd(energy=2, current=current, average=average))
        (reading,) = source.read().values()
        assert reading.power_mw is None
        assert reading.status is not Status.OK


@both
def test_a_gpu_that_vanishes_is_a_gap(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(A), FakeAmd(B))
    source = opened(make)
    amd_machine.show(FakeAmd(A))
    statuses = {device.uid: reading.status for device, reading in source.read().items()}
    assert statuses[A] is Status.OK
    assert statuses[B] is not Status.OK
    amd_machine.show(FakeAmd(A), FakeAmd(B))
    assert [r.status for r in source.read().values()] == [Status.OK, Status.OK]


def test_a_gpu_that_comes_back_elsewhere_is_found_by_its_address(amd_machine: AmdMachine) -> None:
    amd_machine.show(FakeAmd(A), FakeAmd(B))
    source = opened(amdsmi.SOURCE)
    amd_machine.show(FakeAmd(A))
    assert [r.status for r in source.read().values()] == [Status.OK, Status.UNAVAILABLE]
    amd_machine.show(FakeAmd(A), FakeAmd(C, ticks=7 * 65536, watts=0), FakeAmd(B, ticks=5 * 65536, watts=0))
    assert [r.energy_uj for d, r in source.read().items() if d.uid == B] == [5_000_000]


@both
def test_a_shutdown_by_somebody_else_is_survived(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(A), FakeAmd(B))
    source = opened(make)
    make_other = make()
    make_other.open()
    make_other.close()  # the library of this process is down now
    assert [r.status for r in source.read().values()] == [Status.OK, Status.OK]


@both
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_initialises_for_itself(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd())
    source = opened(make)
    pid = os.fork()
    if pid == 0:
        try:
            good = [r.status for r in source.read().values()] == [Status.OK]
        except BaseException:
            good = False
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [r.status for r in source.read().values()] == [Status.OK]


@both
def test_of_an_mi250_the_first_die_reports_for_both(amd_machine: AmdMachine, make: Make) -> None:
    silent = {"ticks": 0, "watts": 0, "current": 0, "average": 0}
    name = "AMD Instinct MI250X"
    amd_machine.show(
        FakeAmd(A, name=name, unique=IDS[A]),
        FakeAmd(B, name=name, unique=IDS[B], **silent),  # type: ignore[arg-type]
        FakeAmd(C, name=name, unique=IDS[C]),
        FakeAmd(D, name=name, unique=IDS[D], **silent),  # type: ignore[arg-type]
    )
    source = opened(make)
    infos = source.devices()
    assert uids(source) == [A, C]
    assert all(info.shared for info in infos.values())
    assert f"with {B} in the same reading" in next(iter(infos.values())).name
    # Each die's rank finds the reading that holds its energy.
    for pci, first in ((A, A), (B, A), (C, C), (D, C)):
        assert [d.uid for d in own_gpus(infos, IDS[pci])] == [first]
        assert [d.uid for d in own_gpus(infos, None, pci)] == [first]


@both
def test_partitions_of_one_gpu_are_read_once(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(
        FakeAmd("0000:c1:00.0", hip=0, unique="1" * 16),
        FakeAmd("0000:c1:00.1", hip=1, unique="2" * 16),  # the same counter once more
        FakeAmd("0000:c1:00.2", hip=2, unique="3" * 16, energy=2, power=2),
    )
    source = opened(make)
    (info,) = source.devices().values()
    assert uids(source) == ["0000:c1:00.0"]
    assert info.shared
    assert {"0000:c1:00.1", "0000:c1:00.2", "GPU-" + "3" * 16} <= set(info.ids)


@both
def test_an_mi300a_covers_the_cpu(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(name="AMD Instinct MI300A"))
    (info,) = opened(make).devices().values()
    assert info.covers == ("cpu", "dram")
    assert "whole socket" in info.name


@pytest.mark.parametrize(
    ("rocr", "hip", "cuda", "expected"),
    [
        (None, None, None, [A, B, C, D]),
        (None, "0", None, [C]),  # HIP's order is C, B, A, D
        (None, "2,0", None, [A, C]),
        (None, None, "0", [C]),
        (None, "1", "0", [B]),
        ("1,2", "1", None, [A]),  # HIP counts what ROCR left
        (f"GPU-{IDS[D]}", None, None, [D]),
        (f"GPU-{IDS[D][:-1]}", None, None, [D]),  # its beginning, if no other has it
        ("GPU-", None, None, []),
        (None, "0,7,1", None, [C]),
        (None, "-1", None, []),
        ("", None, None, []),
    ],
)
def test_visible_devices_in_hips_order(
    amd_machine: AmdMachine,
    monkeypatch: pytest.MonkeyPatch,
    rocr: str | None,
    hip: str | None,
    cuda: str | None,
    expected: list[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    places = {A: 2, B: 1, C: 0, D: 3}
    amd_machine.show(*(FakeAmd(pci, hip=places[pci], unique=IDS[pci]) for pci in (A, B, C, D)))
    for name, value in (("ROCR", rocr), ("HIP", hip), ("CUDA", cuda)):
        if value is not None:
            monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
    if expected:
        assert set(uids(opened(amdsmi.SOURCE))) == set(expected)
    else:
        assert "is visible to this process: see ROCR_VISIBLE_DEVICES" in refusal(amdsmi.SOURCE).reason


def test_next_to_a_cuda_build_of_torch_its_variable_is_not_meant(
    amd_machine: AmdMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    amd_machine.show(FakeAmd(A))
    assert uids(opened(amdsmi.SOURCE)) == [A]


def test_hip_order_comes_from_the_kernel_where_the_library_does_not_know_it(tmp_path: Path) -> None:
    def node(index: int, simd_count: int, location: int, domain: int = 0) -> None:
        folder = tmp_path / str(index)
        folder.mkdir()
        lines = (f"simd_count {simd_count}", f"location_id {location}", f"domain {domain}", "name x")
        (folder / "properties").write_text("\n".join(lines) + "\n")

    node(0, 0, 0)  # a CPU
    node(1, 416, 0xC1 << 8)
    node(2, 416, 0x0C << 8)
    node(10, 416, 0x22 << 8 | 1 << 3 | 2, domain=1)
    (tmp_path / "3").mkdir()  # not to be read
    assert hip_order(tmp_path) == {D: 0, A: 1, "0001:22:01.2": 2}
    assert hip_order(tmp_path / "none") == {}


def test_under_hip_devices_are_found_by_uuid_or_address(
    amd_machine: AmdMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # HIP gives the letters of its UUID where CUDA gives bytes.
    lettered = "-".join(IDS[B].encode().hex()[i:j] for i, j in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    shown = [
        SimpleNamespace(uuid=lettered),
        SimpleNamespace(uuid="00000000-0000-0000-0000-000000000000", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0),
    ]
    assert torch_ids(shown[0]) == (IDS[B], None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: shown[i])
    amd_machine.show(*(FakeAmd(pci, hip=i, unique=IDS[pci]) for i, pci in enumerate((A, B, C, D))))
    for make in LIBRARIES:
        assert uids(opened(make)) == [B, D]


def test_every_source_gives_a_gpu_the_same_id(amd_machine: AmdMachine, tmp_path: Path) -> None:
    amd_machine.show(FakeAmd(A, unique=IDS[A]))
    amd_card(tmp_path, "card0", A, unique=IDS[A])
    hwmon = AmdHwmon(tmp_path, tmp_path / "kfd")
    hwmon.open()
    ids = {device for make in LIBRARIES for device in opened(make).devices()} | set(hwmon.devices())
    assert [device.uid for device in ids] == [A]
    # Of the three the counters are asked first.
    names = [name for name, _ in resolve(None)]
    assert names.index("amdsmi") < names.index("hwmon-amd") > names.index("rocm-smi")


@pytest.mark.parametrize(
    ("make", "init", "status"),
    [(amdsmi.SOURCE, 34, Status.UNAVAILABLE), (amdsmi.SOURCE, 10, Status.NO_PERMISSION)],
)
def test_no_driver(amd_machine: AmdMachine, make: Make, init: int, status: Status) -> None:
    amd_machine.show(init=init)
    refused = refusal(make)
    assert refused.status is status
    assert refused.reason.startswith("amdsmi: AMDSMI_STATUS_")


@both
def test_no_gpu(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show()
    assert refusal(make).status is Status.UNAVAILABLE


def test_rocm_smi_without_a_driver(amd_machine: AmdMachine) -> None:
    amd_machine.show(init=1)
    assert "ROCm-SMI: " in refusal(rocm_smi.SOURCE).reason


@both
def test_a_gpu_that_offers_nothing(amd_machine: AmdMachine, make: Make) -> None:
    amd_machine.show(FakeAmd(energy=2, power=2))
    refused = refusal(make)
    assert refused.status is Status.UNSUPPORTED
    assert "gives neither energy nor power" in refused.reason


def test_what_somebody_can_mend_is_told_first(amd_machine: AmdMachine) -> None:
    amd_machine.show(FakeAmd(energy=10, power=2))
    assert refusal(amdsmi.SOURCE).status is Status.NO_PERMISSION


def test_without_rocm_the_sources_are_absent_and_print_nothing(
    amd_machine: AmdMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_amdsmi()
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    refused = refusal(amdsmi.SOURCE)
    assert refused.status is Status.UNAVAILABLE
    assert "amdsmi finds no libamd_smi.so" in refused.reason
    assert "ROCM_PATH" in refused.reason
    assert "librocm_smi64.so not found: install ROCm, or set ROCM_PATH" in refusal(rocm_smi.SOURCE).reason
    assert capsys.readouterr().out == ""


def test_without_the_package_amdsmi_the_extra_is_named(
    amd_machine: AmdMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "amdsmi":
                raise ModuleNotFoundError("No module named 'amdsmi'", name="amdsmi")

    forget_amdsmi()
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert "pip install 'lightning-estdgm[amd]'" in refusal(amdsmi.SOURCE).reason


def test_an_older_rocm_has_no_current_power(
    amd_machine: AmdMachine, rocm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROCM_PATH", str(rocm_folder / "old"))
    amd_machine.show(FakeAmd(energy=2, average=225))
    assert [r.power_mw for r in opened(rocm_smi.SOURCE).read().values()] == [225_000]


def test_a_rocm_that_does_not_fit_the_package_is_named(
    amd_machine: AmdMachine, rocm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_amdsmi()
    monkeypatch.setenv("ROCM_PATH", str(rocm_folder / "bare"))  # it lacks functions that this amdsmi looks up
    assert "amdsmi does not fit the installed ROCm" in refusal(amdsmi.SOURCE).reason
