"""NVIDIA GPUs and MIG slices that are visible to this process, as NVML handles.

Under CUDA these are torch's devices, by UUID. Before CUDA starts, CUDA_VISIBLE_DEVICES is read as CUDA does: by
index or by (abbreviated) UUID, ending at the first entry that is not valid. What an index means depends on
CUDA_DEVICE_ORDER; where it matters (GPUs of several models, not in PCI order) CUDA is asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

# CUDA's own order of the devices, asked in another process: CUDA that has started survives no fork.
_CUDA_UUIDS = """
import ctypes, uuid
cuda = ctypes.CDLL("libcuda.so.1")
count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for i in range(count.value):
    assert cuda.cuDeviceGet(ctypes.byref(device), i) == 0
    assert getattr(cuda, "cuDeviceGetUuid_v2", cuda.cuDeviceGetUuid)(raw, device) == 0
    print(uuid.UUID(bytes=bytes(raw)))
"""


_GPU_IS_LOST = 15  # an NVML error


@dataclass(frozen=True)
class NvmlHandle:
    """A device of NVML.

    Attributes:
        handle: Argument of NVML's calls.
        is_mig: Whether it is a MIG slice.
    """

    handle: Any
    is_mig: bool = False


def visible_handles(nvml: Any) -> tuple[list[NvmlHandle], str]:
    """Return the devices that this process may use, and a note on their order for people, empty where it is certain.

    Args:
        nvml: The module pynvml, initialised; its errors are passed on.
    """
    handles = _torch_handles(nvml)
    return _environment_handles(nvml) if handles is None else (handles, "")


def as_str(text: str | bytes) -> str:
    """Return a text of NVML as a str: older versions of pynvml give bytes."""
    return text.decode() if isinstance(text, bytes) else text


def _torch_handles(nvml: Any) -> list[NvmlHandle] | None:
    """Return torch's devices; None while CUDA is not running, which is not ours to start."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized() or torch.version.hip:
        return None
    return _by_bare_uuids(
        nvml, [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    )


def _environment_handles(nvml: Any) -> tuple[list[NvmlHandle], str]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves, and the note."""
    by_index = [_by_index(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
    every = [gpu for gpu in by_index if gpu is not None]
    lost = len(by_index) - len(every)
    note = f", beside {lost} lost" if lost else ""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return every, note
    tokens = [t.strip() for t in text.split(",")]
    if any(token.isdigit() for token in tokens) and _order_matters(nvml, every):
        asked = _cuda_handles(nvml)
        if asked is not None:
            return asked, note
        note += ", taken in PCI order: to be sure, set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    handles = []
    for token in tokens:
        if token.isdigit() and int(token) < len(by_index):
            gpu = by_index[int(token)]
            handles += [] if gpu is None else [gpu]
            continue
        found = _by_uuid(nvml, token) if token.startswith(("GPU-", "MIG-")) else None
        if found is None and token.startswith("GPU-"):
            match = [gpu for gpu in every if as_str(nvml.nvmlDeviceGetUUID(gpu.handle)).startswith(token)]
            found = match[0] if len(match) == 1 else None
        if found is None:
            break  # CUDA hides everything from the first invalid entry on
        handles.append(found)
    return handles, note


def _by_index(nvml: Any, index: int) -> NvmlHandle | None:
    """Return a GPU, or None for one that has fallen off the bus: the others go on."""
    try:
        return NvmlHandle(nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as e:
        if e.value == _GPU_IS_LOST:
            return None
        raise


def _order_matters(nvml: Any, gpus: list[NvmlHandle]) -> bool:
    """Return whether CUDA's order may differ from NVML's, which is PCI's.

    It is the same if CUDA is told so, or if no GPU is faster than another.
    """
    if os.environ.get("CUDA_DEVICE_ORDER", "").strip().upper() == "PCI_BUS_ID":
        return False
    return len({as_str(nvml.nvmlDeviceGetName(gpu.handle)) for gpu in gpus}) > 1


def _cuda_handles(nvml: Any) -> list[NvmlHandle] | None:
    """Return the devices that CUDA would show this process; None where CUDA does not answer."""
    command = [sys.executable, "-c", _CUDA_UUIDS]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return _by_bare_uuids(nvml, answer.split())


def _by_bare_uuids(nvml: Any, uuids: list[str]) -> list[NvmlHandle]:
    """Return the devices of UUIDs without their prefix; those that NVML does not know are left out."""
    handles = [_by_uuid(nvml, f"GPU-{uuid}") or _by_uuid(nvml, f"MIG-{uuid}") for uuid in uuids]
    return [handle for handle in handles if handle is not None]


def _by_uuid(nvml: Any, uuid: str) -> NvmlHandle | None:
    try:
        return NvmlHandle(nvml.nvmlDeviceGetHandleByUUID(uuid), uuid.startswith("MIG-"))
    except nvml.NVMLError as e:
        if e.value in (2, 6, _GPU_IS_LOST):  # invalid argument, not found
            return None
        raise
