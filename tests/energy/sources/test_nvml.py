from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
import torch

from helpers.energy_parts import ConstantPower, FakeGpu, Machine, compile_library, totals_over
from lightning_estdgm.callbacks._internal.energy_fit import own_devices
from lightning_estdgm.energy._reading import DeviceInfo, SourceUnavailable, Status
from lightning_estdgm.energy.sources import nvml
from lightning_estdgm.energy.sources.nvml import Nvml

A, B, C = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000"


def opened() -> Nvml:
    source = Nvml()
    source.open()
    return source


def uids(source: Nvml) -> list[str]:
    return [device.uid for device in source.devices()]


def test_the_counter_is_read_in_microjoules(machine: Machine) -> None:
    machine.show(FakeGpu(A, mj=12_345))
    source = opened()
    (device,) = source.devices()
    assert (device.kind, device.uid) == ("gpu", A)
    assert source.method == "counter"
    assert source.wrap_range_uj(device) is None
    assert "Fake GPU" in source.devices()[device].name
    reading = source.read()[device]
    assert (reading.energy_uj, reading.power_mw, reading.status) == (12_345_000, None, Status.OK)
    source.close()
    source.close()
    assert source.read() == {}


def test_without_a_counter_the_instant_power_is_read_then_the_average(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=3, mw=310_000), FakeGpu(B, energy=3, instant=3, avg=205_000), FakeGpu(C))
    source = opened()
    assert source.method == "integrated"
    readings = {device.uid: reading for device, reading in source.read().items()}
    assert (readings[A].power_mw, readings[A].energy_uj) == (310_000, None)
    assert (readings[B].power_mw, readings[B].energy_uj) == (205_000, None)
    assert readings[C].energy_uj is not None


@pytest.mark.parametrize("mw", [0, 65_535_000, 2**32 - 1])
def test_power_that_no_gpu_draws_is_a_gap_and_a_sensor_with_such_a_value_is_passed_over(
    machine: Machine, mw: int
) -> None:
    machine.show(FakeGpu(A, energy=3, instant=3, avg=mw), FakeGpu(B, energy=3, mw=mw, avg=205_000))
    readings = {device.uid: reading for device, reading in opened().read().items()}
    assert (readings[A].power_mw, readings[A].status) == (None, Status.ERROR)
    assert readings[B].power_mw == 205_000


def test_an_old_driver_does_not_know_the_instant_field(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=13, instant=2, avg=99_000))
    source = opened()
    assert [r.power_mw for r in source.read().values()] == [99_000]


@pytest.mark.parametrize(
    ("init", "status"),
    [(9, Status.UNAVAILABLE), (12, Status.UNAVAILABLE), (18, Status.UNAVAILABLE), (4, Status.NO_PERMISSION)],
)
def test_no_driver(machine: Machine, init: int, status: Status) -> None:
    machine.show(FakeGpu(A), init=init)
    with pytest.raises(SourceUnavailable, match="NVML: ") as caught:
        Nvml().open()
    assert caught.value.status is status


def test_no_gpu(machine: Machine) -> None:
    machine.show()
    with pytest.raises(SourceUnavailable, match="no NVIDIA GPU is visible"):
        Nvml().open()


def test_a_gpu_that_offers_nothing(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=3, instant=3, usage=3))
    with pytest.raises(SourceUnavailable, match="neither energy nor power: unsupported") as caught:
        Nvml().open()
    assert caught.value.status is Status.UNSUPPORTED


def test_no_permission_is_not_passed_over_for_a_worse_reading(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=4))
    with pytest.raises(SourceUnavailable) as caught:
        Nvml().open()
    assert caught.value.status is Status.NO_PERMISSION


def test_one_refused_gpu_beside_a_good_one_stays_visible_as_a_gap(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=4), FakeGpu(B))
    source = opened()
    statuses = {device.uid: reading.status for device, reading in source.read().items()}
    assert statuses == {A: Status.NO_PERMISSION, B: Status.OK}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (10, Status.ERROR),
        (21, Status.ERROR),
        (999, Status.ERROR),
        (3, Status.UNSUPPORTED),
        (4, Status.NO_PERMISSION),
        (15, Status.UNAVAILABLE),
        (16, Status.UNAVAILABLE),
    ],
)
def test_a_failed_read_is_a_status_and_heals(machine: Machine, code: int, status: Status) -> None:
    machine.show(FakeGpu(A))
    source = opened()
    machine.show(FakeGpu(A, energy=code, handle=code if status is Status.UNAVAILABLE else 0))
    for _ in range(2):
        (reading,) = source.read().values()
        assert (reading.energy_uj, reading.power_mw, reading.status) == (None, None, status)
    machine.show(FakeGpu(A, mj=7))
    (reading,) = source.read().values()
    assert (reading.energy_uj, reading.status) == (7000, Status.OK)


def test_a_gpu_that_comes_back_elsewhere_is_found_by_its_uuid(machine: Machine) -> None:
    machine.show(FakeGpu(A))
    source = opened()
    machine.show(FakeGpu(A, energy=15, handle=15))
    assert [r.status for r in source.read().values()] == [Status.UNAVAILABLE]
    machine.show(FakeGpu(B, mj=1), FakeGpu(A, mj=2))
    assert [r.energy_uj for r in source.read().values()] == [2000]


def test_a_shutdown_by_somebody_else_is_survived(machine: Machine) -> None:
    import pynvml

    machine.show(FakeGpu(A, mj=5))
    source = opened()
    with contextlib.suppress(pynvml.NVMLError_Uninitialized):
        while True:  # NVML counts how often it was initialised
            pynvml.nvmlShutdown()
    assert [r.energy_uj for r in source.read().values()] == [5000]


def test_a_passing_error_at_the_start_keeps_the_counter(machine: Machine) -> None:
    machine.show(FakeGpu(A, energy=10))
    source = opened()
    assert [r.status for r in source.read().values()] == [Status.ERROR]
    machine.show(FakeGpu(A, mj=1))
    assert [r.energy_uj for r in source.read().values()] == [1000]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", [A]),
        ("2,0", [C, A]),
        ("1, 2", [B, C]),
        (B, [B]),
        ("GPU-bbcc", [C]),
        ("GPU-bb", []),  # ambiguous: CUDA refuses it
        (f"{C},0", [C, A]),
        ("0,-1,1", [A]),
        ("0,7,1", [A]),
        ("0,nonsense,1", [A]),
        ("", []),
        ("1,1", [B]),
    ],
)
def test_cuda_visible_devices(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    machine.show(FakeGpu(A), FakeGpu(B), FakeGpu(C))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if not expected:
        with pytest.raises(SourceUnavailable, match="no NVIDIA GPU is visible"):
            Nvml().open()
    else:
        assert uids(opened()) == expected


def test_a_mig_slice_is_read_from_its_parent_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A), FakeGpu(B), mig=[("MIG-1", 1), ("MIG-2", 1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    source = opened()
    assert uids(source) == [B]
    (info,) = source.devices().values()
    assert info.shared
    assert "MIG" in info.name
    assert info.ids == ("MIG-1", "MIG-2")


def test_a_slice_of_a_lost_gpu_leaves_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A, handle=15), FakeGpu(B), mig=[("MIG-1", 0), ("MIG-2", 1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    source = opened()
    assert uids(source) == [B]
    assert all("beside 1 lost" in info.name for info in source.devices().values())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    with pytest.raises(SourceUnavailable, match="NVML: GPU is lost"):
        Nvml().open()


def test_a_reset_is_a_gap_and_no_negative_energy(machine: Machine) -> None:
    machine.show(FakeGpu(A, mj=5_000_000))
    shows = [partial(machine.show, FakeGpu(A, mj=mj)) for mj in (5_002_000, 1_000, 4_000)]
    totals = totals_over(opened(), *shows)
    assert totals.joules() == 2.0 + 3.0
    assert (totals.gaps, totals.segments) == (1, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_initialises_for_itself(machine: Machine) -> None:
    machine.show(FakeGpu(A, mj=3))
    source = opened()
    pid = os.fork()
    if pid == 0:
        try:
            good = [r.energy_uj for r in source.read().values()] == [3000]
        except BaseException:
            good = False
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [r.energy_uj for r in source.read().values()] == [3000]


def test_without_pynvml_the_source_is_absent_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what `import` sees where it is not installed
    with pytest.raises(SourceUnavailable, match="nvidia-ml-py is not installed") as caught:
        Nvml().open()
    assert caught.value.status is Status.UNAVAILABLE


def cuda_shows(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Torch as it answers once CUDA runs with these devices: NVML's UUIDs, without the prefix."""
    properties = [SimpleNamespace(uuid=uuid.split("-", 1)[1]) for uuid in uuids]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties[getattr(i, "index", i)])


def test_under_cuda_devices_are_found_by_uuid_not_by_index(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A), FakeGpu(B), FakeGpu(C), mig=[("MIG-9-9", 0)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # in CUDA's order, which need not be NVML's
    cuda_shows(monkeypatch, C)
    assert uids(opened()) == [C]
    cuda_shows(monkeypatch, "MIG-9-9")
    assert uids(opened()) == [A]


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:0", [C, "package-0"]), ("cuda:1", [B, "package-0"]), ("cpu", [B, C, "package-0"])]
)
def test_a_rank_offers_its_own_gpu_and_all_that_is_no_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]
) -> None:
    machine.show(FakeGpu(A), FakeGpu(B), FakeGpu(C))
    cuda_shows(monkeypatch, C, B)
    rank = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    devices = {**opened().devices(), **ConstantPower(kind="cpu", uid="package-0").devices()}
    assert sorted(d.uid for d in own_devices(rank, devices)) == sorted(expected)


def test_what_is_known_of_a_gpu(machine: Machine) -> None:
    machine.show(FakeGpu(A, pci="00000001:C1:00.0", name="NVIDIA H100 80GB HBM3"))
    source = opened()
    (info,) = source.devices().values()
    assert info == DeviceInfo("NVIDIA H100 80GB HBM3, energy counter", pci="0001:c1:00.0")
    assert source.driver == "nvidia 999.1"


def test_a_grace_hopper_counter_is_named_as_the_modules(machine: Machine) -> None:
    machine.show(FakeGpu(A, name="NVIDIA GH200 480GB"))
    (info,) = opened().devices().values()
    assert info.covers == ("cpu", "dram")
    assert "of the whole Grace-Hopper module (GPU, CPU and memory)" in info.name
    machine.show(FakeGpu(A, name="NVIDIA GH200 480GB", energy=3))  # the power field has the GPU's scope
    (info,) = opened().devices().values()
    assert info.covers == ()


def test_a_gpu_in_mig_mode_is_shared_even_if_asked_for_by_index(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.show(FakeGpu(A, mig=1), FakeGpu(B, mig=0))
    assert [info.shared for info in opened().devices().values()] == [True, False]


def test_many_gpus(machine: Machine) -> None:
    gpus = [FakeGpu(f"GPU-{i:08x}", mj=1000 * i, pci=f"00000000:{i:02X}:00.0") for i in range(64)]
    machine.show(*gpus)
    source = opened()
    assert [r.energy_uj for r in source.read().values()] == [gpu.mj * 1000 for gpu in gpus]
    assert len({info.pci for info in source.devices().values()}) == 64
    some = list(source.devices())[3:5]
    assert [r.energy_uj for r in source.read(some).values()] == [3_000_000, 4_000_000]


def test_a_counter_that_stands_still_jumps_or_goes_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.show(FakeGpu(A, mj=0))
    source = opened()
    clock = 10**9
    monkeypatch.setattr(nvml.time, "monotonic_ns", lambda: clock)
    statuses = []
    for seconds, gpu in [
        (0, FakeGpu(A, mj=1000)),
        (0.1, FakeGpu(A, mj=1000)),  # not renewed yet
        (1, FakeGpu(A, mj=1000)),
        (1, FakeGpu(A, mj=1000, usage=10)),  # nor can its power be read
        (1, FakeGpu(A, mj=1000, avg=0)),  # switched off: it may stand still
        (1, FakeGpu(A, mj=301_000)),
        (1, FakeGpu(A, mj=300_000)),  # backwards: the accumulator's gap
        (1, FakeGpu(A, mj=20_300_000)),  # 20 kJ in a second
        (1, FakeGpu(A, mj=20_500_000)),
    ]:
        clock += round(seconds * 1e9)
        machine.show(gpu)
        (reading,) = source.read().values()
        assert (reading.energy_uj is None) == (reading.status is not Status.OK)
        statuses.append(reading.status)
    ok, bad = Status.OK, Status.UNAVAILABLE
    assert statuses == [ok, ok, bad, bad, ok, ok, ok, bad, ok]
    assert [r.getMessage() for r in caplog.records] == [
        f"The energy counter of Fake GPU ({A}) stands still while it draws 250 W: not counted, shown as a gap."
    ]


def cuda_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """A libcuda.so.1 that shows these devices, in this order, to processes started from now on."""
    rows = ["{" + ",".join(f"0x{byte:02x}" for byte in UUID(uuid.partition("-")[2]).bytes) + "}" for uuid in uuids]
    code = f"""
    #include <string.h>
    static unsigned char uuids[][16] = {{{",".join(rows)}}};
    int cuInit(unsigned flags) {{ return flags; }}
    int cuDeviceGetCount(int *n) {{ *n = {len(uuids)}; return 0; }}
    int cuDeviceGet(int *device, int i) {{ *device = i; return 0; }}
    int cuDeviceGetUuid(void *out, int device) {{ return 1; }}
    int cuDeviceGetUuid_v2(void *out, int device) {{ memcpy(out, uuids[device], 16); return 0; }}
    """
    (tmp_path / "cuda.c").write_text(code)
    compile_library(tmp_path / "cuda.c", tmp_path / "libcuda.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


def test_what_an_index_means_is_asked_of_cuda_where_the_order_matters(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = (f"GPU-{UUID(int=i)}" for i in (1, 2))
    machine.show(FakeGpu(slow, name="Slow"), FakeGpu(fast, name="Fast"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cuda_answers(tmp_path, monkeypatch, fast)
    assert uids(opened()) == [fast]  # CUDA puts the fastest first
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert uids(opened()) == [slow]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert uids(opened()) == [fast]
    machine.show(FakeGpu(slow, name="Same"), FakeGpu(fast, name="Same"))
    assert uids(opened()) == [slow]
    machine.show(FakeGpu(slow, name="Slow"), FakeGpu(fast, name="Fast"))
    (tmp_path / "libcuda.so.1").write_text("broken")
    (info,) = opened().devices().values()
    assert info.name == "Slow, energy counter, taken in PCI order: to be sure, set CUDA_DEVICE_ORDER=PCI_BUS_ID"


def test_a_gpu_that_is_lost_leaves_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A), FakeGpu(B, handle=15), FakeGpu(C))
    source = opened()
    assert uids(source) == [A, C]
    assert all("beside 1 lost (GPU 1: " in info.name for info in source.devices().values())
    assert {reading.status for reading in source.read().values()} == {Status.OK}
    source.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")  # the lost one keeps its index
    assert uids(opened()) == [C]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{C},{B},{A}")
    assert uids(opened()) == [C, A]


@pytest.mark.parametrize("code", [4, 16, 999])
def test_a_gpu_that_is_refused_leaves_the_others(machine: Machine, code: int) -> None:
    machine.show(FakeGpu(A, handle=code), FakeGpu(B))
    assert uids(opened()) == [B]


def test_a_gpu_that_is_lost_leaves_the_others_under_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A), FakeGpu(B, handle=15))
    cuda_shows(monkeypatch, B, A)
    source = opened()
    assert uids(source) == [A]
    (info,) = source.devices().values()
    assert f"beside 1 lost (GPU {B.removeprefix('GPU-')}: " in info.name


def test_where_every_gpu_is_lost_that_is_the_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.show(FakeGpu(A, handle=15), FakeGpu(B, handle=15))
    with pytest.raises(SourceUnavailable, match="NVML: GPU is lost") as caught:
        Nvml().open()
    assert caught.value.status is Status.UNAVAILABLE
    machine.show(FakeGpu(A, handle=15), FakeGpu(B))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SourceUnavailable, match="CUDA_VISIBLE_DEVICES is '0', beside 1 lost"):
        Nvml().open()


def test_a_gpu_that_is_lost_in_mid_run_is_a_gap_and_the_others_go_on(machine: Machine) -> None:
    machine.show(FakeGpu(A), FakeGpu(B))
    source = opened()
    machine.show(FakeGpu(A, mj=2_000_000), FakeGpu(B, handle=15, energy=15))
    readings = {device.uid: reading for device, reading in source.read().items()}
    assert readings[A].energy_uj == 2_000_000_000
    assert (readings[B].energy_uj, readings[B].status) == (None, Status.UNAVAILABLE)
