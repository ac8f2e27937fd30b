"""AMD GPUs through the ROCm-SMI library (librocm_smi64.so), for ROCm installations without amdsmi."""

from __future__ import annotations

import contextlib
import ctypes
import os
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_size_t, c_uint32, c_uint64
from typing import Any

from lightning_estdgm.energy._amd_gpus import AmdGpus, AmdLibraryError, answering, valid
from lightning_estdgm.energy._amd_visibility import AmdGpu, hip_order, pci_address
from lightning_estdgm.energy._reading import SourceUnavailable, Status

_STATUS = {
    2: Status.UNSUPPORTED,
    9: Status.UNSUPPORTED,  # not yet implemented
    4: Status.NO_PERMISSION,
    8: Status.UNAVAILABLE,  # not initialised
    10: Status.UNAVAILABLE,  # not found
}  # every other code may pass: interrupted (12), no data (14), busy (16)
_STALE = (8, 10)

_COMPONENT_DRIVER = 0  # RSMI_SW_COMP_DRIVER

_ARGUMENTS: dict[str, list[Any]] = {
    "rsmi_init": [c_uint64],
    "rsmi_shut_down": [],
    "rsmi_num_monitor_devices": [POINTER(c_uint32)],
    "rsmi_dev_pci_id_get": [c_uint32, POINTER(c_uint64)],
    "rsmi_dev_name_get": [c_uint32, POINTER(c_char), c_size_t],
    "rsmi_dev_unique_id_get": [c_uint32, POINTER(c_uint64)],
    "rsmi_dev_energy_count_get": [c_uint32, POINTER(c_uint64), POINTER(c_float), POINTER(c_uint64)],
    "rsmi_dev_current_socket_power_get": [c_uint32, POINTER(c_uint64)],
    "rsmi_dev_power_ave_get": [c_uint32, c_uint32, POINTER(c_uint64)],
    "rsmi_version_str_get": [c_uint32, POINTER(c_char), c_uint32],
    "rsmi_status_string": [c_uint32, POINTER(c_char_p)],
}


class RocmSmi:
    """Binding to librocm_smi64.so; handles are its device indices."""

    name = "rocm-smi"

    def __init__(self) -> None:
        self._lib: Any = None

    def load(self) -> tuple[str, list[AmdGpu]]:
        """Load the library and list the GPUs."""
        if self._lib is None:
            self._lib = _load()
        count = c_uint32()
        try:
            self._call("rsmi_init", 0)
            self._call("rsmi_num_monitor_devices", byref(count))
            order = hip_order()
            gpus = answering(range(count.value), lambda index: self._gpu(index, order))
        except AmdLibraryError as e:
            raise SourceUnavailable(e.status, f"ROCm-SMI: {e}") from None
        if not gpus:
            raise SourceUnavailable(Status.UNAVAILABLE, "ROCm-SMI shows no AMD GPU: is the driver amdgpu loaded?")
        text = ctypes.create_string_buffer(256)
        with contextlib.suppress(AmdLibraryError):
            self._call("rsmi_version_str_get", _COMPONENT_DRIVER, text, len(text))
        return f"amdgpu {text.value.decode(errors='replace')}".strip(), gpus

    def energy(self, gpu: AmdGpu) -> tuple[int, float]:
        """Return the accumulator."""
        ticks, resolution, stamp = c_uint64(), c_float(), c_uint64()
        self._call("rsmi_dev_energy_count_get", gpu.handle, byref(ticks), byref(resolution), byref(stamp))
        return ticks.value, resolution.value

    def power_mw(self, gpu: AmdGpu) -> int:
        """Return the current power where the GPU has one (MI300 and later), else the average."""
        power = c_uint64()
        for function, sensor in (("rsmi_dev_current_socket_power_get", ()), ("rsmi_dev_power_ave_get", (0,))):
            try:
                self._call(function, gpu.handle, *sensor, byref(power))
            except AmdLibraryError as e:
                if e.status is not Status.UNSUPPORTED:
                    raise
                continue
            microwatts = valid(power.value)  # the unit of both
            if microwatts:
                return microwatts // 1000
        raise AmdLibraryError(Status.UNSUPPORTED, "no power reading")

    def close(self) -> None:
        """Shut ROCm-SMI down."""
        if self._lib is not None:
            with contextlib.suppress(AmdLibraryError):  # shut down already: nothing left to give back
                self._call("rsmi_shut_down")

    def _gpu(self, index: int, order: dict[str, int]) -> AmdGpu:
        location, unique, name = c_uint64(), c_uint64(), ctypes.create_string_buffer(256)
        self._call("rsmi_dev_pci_id_get", index, byref(location))
        pci = pci_address(location.value >> 32, location.value)
        ids: tuple[str, ...] = ()
        with contextlib.suppress(AmdLibraryError):
            self._call("rsmi_dev_unique_id_get", index, byref(unique))
            ids = (f"GPU-{unique.value:016x}",)
        with contextlib.suppress(AmdLibraryError):
            self._call("rsmi_dev_name_get", index, name, len(name))
        return AmdGpu(index, pci, name.value.decode(errors="replace") or "AMD GPU", ids, order.get(pci))

    def _call(self, function: str, *args: Any) -> None:
        code = getattr(self._lib, function)(*args)
        if code:
            text = c_char_p()
            self._lib.rsmi_status_string(code, byref(text))
            reason = (text.value or b"error").decode(errors="replace").strip()
            raise AmdLibraryError(_STATUS.get(code, Status.ERROR), f"{reason} ({code})", stale=code in _STALE)


def _load() -> Any:
    name = "librocm_smi64.so"
    roots = [os.path.join(os.environ[v], "lib") for v in ("ROCM_HOME", "ROCM_PATH") if os.environ.get(v)]
    # "" leaves the search to the loader. Without ROCm's development files only the numbered names are there.
    names = [name, *(f"{name}.{version}" for version in (7, 6, 5, 1))]
    for place in (os.path.join(root, each) for root in (*roots, "", "/opt/rocm/lib") for each in names):
        with contextlib.suppress(OSError):
            lib = ctypes.CDLL(place)
            break
    else:
        raise SourceUnavailable(Status.UNAVAILABLE, f"{name} not found: install ROCm, or set ROCM_PATH")
    for function, arguments in _ARGUMENTS.items():
        try:
            getattr(lib, function).argtypes = arguments
        except AttributeError:
            # Only the current power is younger than the others (ROCm 6).
            if function != "rsmi_dev_current_socket_power_get":
                why = f"{place} lacks {function}: it is too old or too new, install ROCm 5 to 7"
                raise SourceUnavailable(Status.UNAVAILABLE, why) from None
            setattr(lib, function, lambda *_: 2)
        else:
            getattr(lib, function).restype = c_uint32
    return lib


def SOURCE() -> AmdGpus:
    """Return the source as `discover` makes it."""
    return AmdGpus(RocmSmi())
