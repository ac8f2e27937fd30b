from __future__ import annotations

import _ctypes
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from energy_parts import ConstantPower, FakeGpu, Machine

from lightning_estdgm.callbacks.energy import _own_devices
from lightning_estdgm.energy import SourceUnavailable, Status
from lightning_estdgm.energy.meter import Meter
from lightning_estdgm.energy.nvml import Nvml

A, B, C = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000"


@pytest.fixture(scope="module")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Build the stand-in and load it under the real library's name; the real pynvml then finds it."""
    pynvml = pytest.importorskip("pynvml")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    if pynvml.nvmlLib is not None:
        pytest.skip("the real NVML is already loaded in this process")
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libnvidia-ml.so.1", "-o", library, source], check=True
    )
    held = ctypes.CDLL(str(library))  # dlopen("libnvidia-ml.so.1") matches a loaded library by its soname
    yield
    if pynvml.nvmlLib is not None:
        _ctypes.dlclose(pynvml.nvmlLib._handle)
    _ctypes.dlclose(held._handle)
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def machine(nvml_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "machine.txt"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Machine(tmp_path / "machine.txt")


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
    assert "Fake GPU" in source.devices()[device]
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
    assert "shared" in next(iter(source.devices().values()))


def test_a_reset_is_a_gap_and_no_negative_energy(machine: Machine) -> None:
    machine.show(FakeGpu(A, mj=5_000_000))
    meter = Meter([("nvml", Nvml())], interval_s=3600.0)
    meter.start("train", "train")
    for mj in (5_002_000, 1_000, 4_000):
        machine.show(FakeGpu(A, mj=mj))
        meter.read()
    totals = meter.totals()
    meter.stop()
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
    ("local_rank", "device", "expected"),
    [
        (0, "cuda:0", [C, "package-0"]),
        (1, "cuda:1", [B]),
        (0, "cpu", [B, C, "package-0"]),
        (1, "cpu", []),
    ],
)
def test_a_rank_reads_its_own_gpu_and_local_rank_0_what_is_shared(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, local_rank: int, device: str, expected: list[str]
) -> None:
    machine.show(FakeGpu(A), FakeGpu(B), FakeGpu(C))
    cuda_shows(monkeypatch, C, B)
    source, rapl = opened(), ConstantPower(kind="cpu", uid="package-0")
    rank = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), local_rank=local_rank)
    chosen = [*_own_devices(rank, source, source.devices()), *_own_devices(rank, rapl, rapl.devices())]
    assert sorted(d.uid for d in chosen) == sorted(expected)
