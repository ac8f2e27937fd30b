"""AMD GPUs through amdsmi, the Python package of ROCm (in this project's extra ``amd``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from lightning_estdgm.energy._amd_gpus import AmdGpus, AmdLibraryError, answering, valid
from lightning_estdgm.energy._amd_visibility import AmdGpu, hip_order
from lightning_estdgm.energy._reading import SourceUnavailable, Status

_STATUS = {
    2: Status.UNSUPPORTED,
    3: Status.UNSUPPORTED,
    10: Status.NO_PERMISSION,
    31: Status.UNAVAILABLE,  # device not found
    32: Status.UNAVAILABLE,  # not initialised
    34: Status.UNAVAILABLE,  # driver not loaded
}  # every other code may pass: busy (30), timeout (8), retry (9), no data (40)
_STALE = (31, 32)


class AmdSmi:
    """Binding to the package amdsmi."""

    name = "amdsmi"

    def __init__(self) -> None:
        self._smi: Any = None

    def load(self) -> tuple[str, list[AmdGpu]]:
        """Import amdsmi, which loads libamd_smi.so, and list the GPUs."""
        try:
            # Without the library the import prints to stdout and then fails, with a KeyError.
            with contextlib.redirect_stdout(io.StringIO()):
                import amdsmi
        except ModuleNotFoundError:
            raise SourceUnavailable(
                Status.UNAVAILABLE, "amdsmi is not installed: pip install 'lightning-estdgm[amd]'"
            ) from None
        except AttributeError as e:
            raise SourceUnavailable(
                Status.UNAVAILABLE,
                f"amdsmi does not fit the installed ROCm ({e}): install the amdsmi of that ROCm version",
            ) from None
        except Exception as e:
            raise SourceUnavailable(
                Status.UNAVAILABLE,
                f"amdsmi finds no libamd_smi.so ({type(e).__name__}: {e}): install ROCm, or set ROCM_PATH",
            ) from None
        self._smi = amdsmi
        try:
            self._call(amdsmi.amdsmi_init, amdsmi.AmdSmiInitFlags.INIT_AMD_GPUS)
            handles = self._call(amdsmi.amdsmi_get_processor_handles)
            order = hip_order()
            gpus = answering(handles, lambda handle: self._gpu(handle, order))
        except AmdLibraryError as e:
            raise SourceUnavailable(e.status, f"amdsmi: {e}") from None
        if not gpus:
            raise SourceUnavailable(Status.UNAVAILABLE, "amdsmi shows no AMD GPU")
        return self._driver(gpus[0]), gpus

    def energy(self, gpu: AmdGpu) -> tuple[int, float]:
        """Return the accumulator; the key was renamed in ROCm 6.2."""
        answer = self._call(self._smi.amdsmi_get_energy_count, gpu.handle)
        return answer.get("energy_accumulator", answer.get("power")), answer["counter_resolution"]

    def power_mw(self, gpu: AmdGpu) -> int:
        """Return the current power where the GPU has one (MI300 and later), else the average."""
        answer = self._call(self._smi.amdsmi_get_power_info, gpu.handle)
        for key in ("current_socket_power", "average_socket_power", "socket_power"):
            watts = valid(answer.get(key))
            if watts:
                return watts * 1000
        raise AmdLibraryError(Status.UNSUPPORTED, "no power reading")

    def close(self) -> None:
        """Shut amdsmi down."""
        if self._smi is not None:
            with contextlib.suppress(AmdLibraryError):  # shut down already: nothing left to give back
                self._call(self._smi.amdsmi_shut_down)

    def _gpu(self, handle: Any, order: dict[str, int]) -> AmdGpu:
        pci = str(self._call(self._smi.amdsmi_get_gpu_device_bdf, handle)).lower()
        name, ids, place = "AMD GPU", [], order.get(pci)
        with contextlib.suppress(AmdLibraryError):
            name = self._call(self._smi.amdsmi_get_gpu_asic_info, handle)["market_name"]
        with contextlib.suppress(AmdLibraryError):
            ids.append(self._call(self._smi.amdsmi_get_gpu_device_uuid, handle))
        # HIP's order may differ from amdsmi's, and its UUID from amdsmi's. Not in ROCm before 6.4.
        with contextlib.suppress(AmdLibraryError, AttributeError):
            numbers = self._call(self._smi.amdsmi_get_gpu_enumeration_info, handle)
            hip_id = valid(numbers["hip_id"])
            place = place if hip_id is None else hip_id
            ids.append(numbers["hip_uuid"])
        return AmdGpu(handle, pci, name, tuple(dict.fromkeys(uid for uid in ids if uid)), place)

    def _driver(self, gpu: AmdGpu) -> str:
        with contextlib.suppress(AmdLibraryError):
            info = self._call(self._smi.amdsmi_get_gpu_driver_info, gpu.handle)
            return f"{info['driver_name']} {info['driver_version']}"
        return ""

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except self._smi.AmdSmiLibraryException as e:
            code = e.get_error_code()
            text = e.get_error_info(detailed=False)
            raise AmdLibraryError(_STATUS.get(code, Status.ERROR), f"{text} ({code})", stale=code in _STALE) from None


def SOURCE() -> AmdGpus:
    """Return the source as `discover` makes it."""
    return AmdGpus(AmdSmi())
