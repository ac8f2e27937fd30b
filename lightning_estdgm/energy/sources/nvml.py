"""NVIDIA GPUs through NVML (`pynvml` of the package nvidia-ml-py): energy counter, else integrated power.

Devices are known by UUID, so no environment variable can mix them up. Only those that this process may use
are read.

On a GH200 the energy counter is that of the whole module, Grace CPU and memory included (ml-energy/zeus, pull
request 172); it is labelled so, and covers these kinds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_estdgm.energy._counter_check import CounterCheck, is_plausible
from lightning_estdgm.energy._cuda_visibility import NvmlHandle, as_str, visible_handles
from lightning_estdgm.energy._reading import (
    DeviceId,
    DeviceInfo,
    Kind,
    Method,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
    hostname,
)

FIELD_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, mW
SCOPE_GPU = 0

_UNINITIALIZED = 1
_STATUS = {
    3: Status.UNSUPPORTED,
    4: Status.NO_PERMISSION,
    13: Status.UNSUPPORTED,  # the library is older than the function
    9: Status.UNAVAILABLE,  # driver not loaded
    12: Status.UNAVAILABLE,  # library not found
    18: Status.UNAVAILABLE,  # library and driver do not match
    6: Status.UNAVAILABLE,  # no such device
    15: Status.UNAVAILABLE,  # GPU is lost
    16: Status.UNAVAILABLE,  # GPU needs a reset
}  # every other code passes: timeout (10), no data (21), unknown (999)

_HINT = {
    Status.NO_PERMISSION: ": the administrator must allow it (in a container: run it with the GPU's full capabilities)",
    Status.UNSUPPORTED: ": too old a GPU, or a virtual one without power readings",
    Status.UNAVAILABLE: ": see `nvidia-smi` and the kernel log, it may need a reset",
}

_OPEN_HINT = {
    9: ": load the NVIDIA driver",
    12: ": install the NVIDIA driver (in a container: start it with access to the GPUs)",
    18: ": driver and library differ, reboot or reload the driver",
}

_Mode = Literal["counter", "instant", "usage"]


@dataclass
class _Gpu:
    uuid: str
    name: str
    pci: str | None
    mode: _Mode | None = None
    refused: Status = Status.OK  # why there is no mode
    handle: Any = None
    shared: bool = False
    slices: list[str] = field(default_factory=list)
    check: CounterCheck = field(init=False)

    def __post_init__(self) -> None:
        self.check = CounterCheck(f"{self.name} ({self.uuid})")


class Nvml:
    """NVIDIA GPUs that this process may use: torch's devices, or those that CUDA_VISIBLE_DEVICES leaves.

    A MIG slice has no counter of its own: its parent GPU is read, and named as shared.
    """

    name = "nvml"
    scope: Scope = "host"
    update_period_s = 0.1

    def __init__(self) -> None:
        self.driver = ""
        self._note = ""
        self._nvml: Any = None
        self._pid: int | None = None
        self._gpus: dict[DeviceId, _Gpu] = {}

    @property
    def method(self) -> Method:
        """ "counter" if every GPU has one."""
        return "integrated" if any(gpu.mode in ("instant", "usage") for gpu in self._gpus.values()) else "counter"

    def open(self) -> None:
        """Load the library, find the GPUs, and choose once how each is read."""
        try:
            import pynvml
        except ImportError as e:
            raise SourceUnavailable(
                Status.UNAVAILABLE, f"nvidia-ml-py is not installed: pip install nvidia-ml-py ({e})"
            ) from None
        self._nvml = pynvml
        self._note = ""
        try:
            self._init()
            self.driver = f"nvidia {as_str(pynvml.nvmlSystemGetDriverVersion())}"
            gpus = self._visible()
        except pynvml.NVMLError as e:
            self.close()
            raise SourceUnavailable(_status(e), f"NVML: {e}{_OPEN_HINT.get(e.value, '')}") from None
        if not gpus:
            self.close()
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            because = "" if hidden is None else f": CUDA_VISIBLE_DEVICES is {hidden!r}"
            raise SourceUnavailable(
                Status.UNAVAILABLE, f"no NVIDIA GPU is visible to this process{because}{self._note}"
            )
        for gpu in gpus:
            gpu.mode, gpu.refused = self._choose(gpu)
        if all(gpu.mode is None for gpu in gpus):
            self.close()
            refused = gpus[0].refused
            raise SourceUnavailable(
                refused,
                f"{gpus[0].name} gives neither energy nor power: {refused.value}{_HINT.get(refused, '')}",
            )
        host = hostname()
        self._gpus = {DeviceId(host, "gpu", gpu.uuid): gpu for gpu in gpus}

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """Return the GPUs by UUID, with how each is read."""
        return {device: _info(gpu, self._note) for device, gpu in self._gpus.items()}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Return None: NVML documents no wrap, so a counter that goes back was reset (driver reload)."""
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read the GPUs, by one call each."""
        if self._nvml is None:
            return {}
        return {d: self._read(gpu) for d, gpu in self._gpus.items() if devices is None or d in devices}

    def close(self) -> None:
        """Release the library, in the process that initialised it."""
        if self._nvml is not None and self._pid == os.getpid():
            with contextlib.suppress(self._nvml.NVMLError):  # gone already: nothing left to give back
                self._nvml.nvmlShutdown()
        self._pid = None
        self._gpus = {}
        self._nvml = None

    def _init(self) -> None:
        """Initialise NVML once per process, and drop inherited handles: its state does not survive a fork."""
        if self._pid != os.getpid():
            self._nvml.nvmlInit()
            self._pid = os.getpid()
            for gpu in self._gpus.values():
                gpu.handle = None

    def _call(self, gpu: _Gpu, function: Callable[[Any], int]) -> int:
        self._init()
        if gpu.handle is None:  # never hand None to the library: it may crash
            gpu.handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        try:
            return function(gpu.handle)
        except self._nvml.NVMLError as e:
            if e.value != _UNINITIALIZED:
                raise
        self._pid = None
        self._init()
        gpu.handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        return function(gpu.handle)

    def _read(self, gpu: _Gpu) -> Reading:
        if gpu.mode is None:
            return Reading(time.monotonic_ns(), status=gpu.refused)
        try:
            value = self._call(gpu, self._function(gpu.mode))
        except self._nvml.NVMLError as e:
            status = _status(e)
            if status is Status.UNAVAILABLE:
                gpu.handle = None
            return Reading(time.monotonic_ns(), status=status)
        now_ns = time.monotonic_ns()
        if gpu.mode != "counter":
            return Reading(now_ns, power_mw=value) if is_plausible(value) else Reading(now_ns, status=Status.ERROR)
        status = gpu.check.status(value * 1000, now_ns, lambda: self._power_mw(gpu))
        return Reading(now_ns, energy_uj=value * 1000 if status is Status.OK else None, status=status)

    def _power_mw(self, gpu: _Gpu) -> int | None:
        try:
            return self._call(gpu, self._nvml.nvmlDeviceGetPowerUsage)
        except self._nvml.NVMLError:
            return None

    def _function(self, mode: _Mode) -> Callable[[Any], int]:
        if mode == "counter":
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption
        if mode == "usage":
            return self._nvml.nvmlDeviceGetPowerUsage
        return self._instant_mw

    def _instant_mw(self, handle: Any) -> int:
        value = self._nvml.nvmlDeviceGetFieldValues(handle, [(FIELD_POWER_INSTANT, SCOPE_GPU)])[0]
        if value.nvmlReturn != 0:
            raise self._nvml.NVMLError(value.nvmlReturn)
        return int(value.value.uiVal)

    def _choose(self, gpu: _Gpu) -> tuple[_Mode | None, Status]:
        modes: tuple[_Mode, ...] = ("counter", "instant", "usage")
        for mode in modes:
            try:
                value = self._call(gpu, self._function(mode))
            except self._nvml.NVMLError as e:
                status = _status(e)
                # Old drivers call an unknown field an invalid argument (2).
                if status is Status.UNSUPPORTED or (mode == "instant" and e.value == 2):
                    continue
                if status is Status.ERROR:
                    return mode, Status.OK  # it passes: a gap at the start, not a device without energy
                return None, status
            if mode == "instant" and not is_plausible(value):
                continue
            return mode, Status.OK
        return None, Status.UNSUPPORTED

    def _visible(self) -> list[_Gpu]:
        handles, self._note = visible_handles(self._nvml)
        gpus: dict[str, _Gpu] = {}
        lost: list[Any] = []
        for each in handles:
            try:
                self._add(each, gpus)
            except self._nvml.NVMLError as e:  # a slice may still be known whose GPU is lost
                lost.append(e)
        if lost and not gpus:
            raise lost[0]
        if lost:
            self._note += f", beside {len(lost)} lost ({lost[0]})"
        return list(gpus.values())

    def _add(self, each: NvmlHandle, gpus: dict[str, _Gpu]) -> None:
        handle = each.handle
        whole = self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if each.is_mig else handle
        uuid = as_str(self._nvml.nvmlDeviceGetUUID(whole))
        if uuid not in gpus:
            name = as_str(self._nvml.nvmlDeviceGetName(whole))
            gpus[uuid] = _Gpu(uuid, name, self._pci(whole), handle=whole, shared=self._mig_mode(whole))
        if each.is_mig:
            gpus[uuid].shared = True
            gpus[uuid].slices.append(as_str(self._nvml.nvmlDeviceGetUUID(handle)))

    def _pci(self, handle: Any) -> str | None:
        try:
            bus_id = as_str(self._nvml.nvmlDeviceGetPciInfo(handle).busId).lower()
        except self._nvml.NVMLError:
            return None
        domain, _, rest = bus_id.partition(":")
        return f"{domain[-4:]}:{rest}"  # NVML pads the domain to eight digits

    def _mig_mode(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:  # a GPU without MIG
            return False


def _info(gpu: _Gpu, note: str) -> DeviceInfo:
    module = gpu.mode == "counter" and "GH200" in gpu.name.upper()
    how = {"counter": "energy counter", "instant": "instant power", "usage": "averaged power"}
    text = f"{gpu.name}, {how[gpu.mode] if gpu.mode else gpu.refused.value}"
    if module:
        text += " of the whole Grace-Hopper module (GPU, CPU and memory)"
    if gpu.shared:
        text += ", split by MIG: shared with its other slices"
    covers: tuple[Kind, ...] = ("cpu", "dram") if module else ()
    return DeviceInfo(text + note, shared=gpu.shared, covers=covers, pci=gpu.pci, ids=tuple(gpu.slices))


def _status(error: Any) -> Status:
    return _STATUS.get(error.value, Status.ERROR)


SOURCE = Nvml
