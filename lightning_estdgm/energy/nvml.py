"""NVIDIA GPUs through NVML (`pynvml` of the package nvidia-ml-py): energy counter, else integrated power.

Devices are known by UUID, so no environment variable can mix them up. Only those that this process may use
are read.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_estdgm.energy import DeviceId, Method, Reading, Scope, SourceUnavailable, Status, hostname

__all__ = ["SOURCE", "Nvml"]

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

_Mode = Literal["counter", "instant", "usage"]


@dataclass
class _Gpu:
    uuid: str
    label: str
    mode: _Mode | None
    refused: Status = Status.OK  # why there is no mode
    handle: Any = None


class Nvml:
    """The NVIDIA GPUs that this process may use.

    Under CUDA these are torch's devices, by UUID. Before CUDA starts, CUDA_VISIBLE_DEVICES is read as CUDA
    does: by index or by (abbreviated) UUID, ending at the first entry that is not valid. A MIG slice has no
        counter of its own:
    its parent GPU is read, and named as shared.
    """

    name = "nvml"
    scope: Scope = "host"
    update_period_s = 0.1

    def __init__(self) -> None:
        self._nvml: Any = None
        self._pid: int | None = None
        self._gpus: dict[DeviceId, _Gpu] = {}

    @property
    def method(self) -> Method:
        """ "counter" if every GPU has one."""
        return "integrated" if any(gpu.mode in ("instant", "usage") for gpu in self._gpus.values()) else "counter"

    def open(self) -> None:
        """Load the library, find the GPUs, and settle once how each is read."""
        try:
            import pynvml
        except ImportError as e:
            raise SourceUnavailable(Status.UNAVAILABLE, f"nvidia-ml-py is not installed: {e}") from None
        self._nvml = pynvml
        try:
            self._init()
            gpus = self._visible()
        except pynvml.NVMLError as e:
            self.close()
            raise SourceUnavailable(_status(e), f"NVML: {e}") from None
        if not gpus:
            self.close()
            raise SourceUnavailable(Status.UNAVAILABLE, "no NVIDIA GPU is visible to this process")
        for gpu in gpus:
            gpu.mode, gpu.refused = self._choose(gpu)
        if all(gpu.mode is None for gpu in gpus):
            self.close()
            hint = " (ask the administrator: it takes a driver setting)" * (gpus[0].refused is Status.NO_PERMISSION)
            raise SourceUnavailable(
                gpus[0].refused,
                f"{gpus[0].label} gives neither energy nor power: {gpus[0].refused.value}{hint}",
            )
        host = hostname()
        self._gpus = {DeviceId(host, "gpu", gpu.uuid): gpu for gpu in gpus}

    def devices(self) -> Mapping[DeviceId, str]:
        """GPUs by UUID, with what each is read by."""
        how = {"counter": "energy counter", "instant": "instant power", "usage": "averaged power"}
        return {
            device: f"{gpu.label}, {how[gpu.mode] if gpu.mode else gpu.refused.value}"
            for device, gpu in self._gpus.items()
        }

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Unknown: NVML documents no wrap, so a counter that goes back was reset (driver reload)."""
        return None

    def read(self) -> Mapping[DeviceId, Reading]:
        """One call per GPU."""
        if self._nvml is None:
            return {}
        return {device: self._read(gpu) for device, gpu in self._gpus.items()}

    def close(self) -> None:
        """Give the library back, in the process that initialised it."""
        if self._nvml is not None and self._pid == os.getpid():
            with contextlib.suppress(self._nvml.NVMLError):  # gone already: nothing left to give back
                self._nvml.nvmlShutdown()
        self._pid = None
        self._gpus = {}
        self._nvml = None

    def _init(self) -> None:
        """NVML's state does not survive a fork: initialise once per process, and drop inherited handles."""
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
        if gpu.mode == "counter":
            return Reading(now_ns, energy_uj=value * 1000)
        return Reading(now_ns, power_mw=value)

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
                self._call(gpu, self._function(mode))
            except self._nvml.NVMLError as e:
                status = _status(e)
                # Old drivers call an unknown field an invalid argument (2).
                if status is Status.UNSUPPORTED or (mode == "instant" and e.value == 2):
                    continue
                if status is Status.ERROR:
                    return mode, Status.OK  # it passes: a gap at the start, not a device without energy
                return None, status
            return mode, Status.OK
        return None, Status.UNSUPPORTED

    def _visible(self) -> list[_Gpu]:
        handles = self._torch_handles()
        if handles is None:
            handles = self._environment_handles()
        gpus: dict[str, _Gpu] = {}
        for handle, mig in handles:
            whole = self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if mig else handle
            uuid = _str(self._nvml.nvmlDeviceGetUUID(whole))
            shared = ", parent of a MIG slice: shared with its other slices" if mig else ""
            gpus.setdefault(uuid, _Gpu(uuid, _str(self._nvml.nvmlDeviceGetName(whole)) + shared, None, handle=whole))
        return list(gpus.values())

    def _torch_handles(self) -> list[tuple[Any, bool]] | None:
        """(handle, is it a MIG slice) of torch's devices; None while CUDA is not running, which is not our
        business to start.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized() or torch.version.hip:
            return None
        handles = []
        for i in range(torch.cuda.device_count()):
            uuid = torch.cuda.get_device_properties(i).uuid
            handles.append(self._by_uuid(f"GPU-{uuid}") or self._by_uuid(f"MIG-{uuid}"))
        return [h for h in handles if h is not None]

    def _environment_handles(self) -> list[tuple[Any, bool]]:
        count = self._nvml.nvmlDeviceGetCount()
        text = os.environ.get("CUDA_VISIBLE_DEVICES")
        if text is None:
            return [(self._nvml.nvmlDeviceGetHandleByIndex(i), False) for i in range(count)]
        handles = []
        for token in (t.strip() for t in text.split(",")):
            if token.isdigit() and int(token) < count:
                handles.append((self._nvml.nvmlDeviceGetHandleByIndex(int(token)), False))
                continue
            found = self._by_uuid(token) if token.startswith(("GPU-", "MIG-")) else None
            if found is None and token.startswith("GPU-"):
                every = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
                match = [h for h in every if _str(self._nvml.nvmlDeviceGetUUID(h)).startswith(token)]
                found = (match[0], False) if len(match) == 1 else None
            if found is None:
                break  # CUDA hides everything from the first invalid entry on
            handles.append(found)
        return handles

    def _by_uuid(self, uuid: str) -> tuple[Any, bool] | None:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid), uuid.startswith("MIG-")
        except self._nvml.NVMLError as e:
            if e.value in (2, 6):  # invalid argument, not found
                return None
            raise


def _status(error: Any) -> Status:
    return _STATUS.get(error.value, Status.ERROR)


def _str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


SOURCE = Nvml
