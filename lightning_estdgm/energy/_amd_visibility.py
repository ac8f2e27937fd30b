"""AMD GPUs that are visible to this process: their ids, HIP's order, and the variables that hide some of them.

A GPU's id is its PCI address, which amdsmi, ROCm-SMI and the kernel's hwmon files all give, so that a GPU which
several of them offer is read once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, SourceUnavailable, Status, own_gpus, torch_ids
from lightning_estdgm.energy._sysfs import read_text

KFD = "/sys/class/kfd/kfd/topology/nodes"


@dataclass
class AmdGpu:
    """A GPU as a library or the kernel shows it.

    Attributes:
        handle: Argument of the library's calls.
        pci: PCI address, "0000:c1:00.0".
        name: Product name.
        ids: UUIDs of the GPU.
        order: Place in HIP's order; None where it is unknown.
    """

    handle: Any
    pci: str
    name: str
    ids: tuple[str, ...] = ()
    order: int | None = None


def hip_order(root: str | os.PathLike[str] = KFD) -> dict[str, int]:
    """Return the place in HIP's order by PCI address, of each GPU that ROCm's kernel driver knows.

    Args:
        root: Folder of the driver's nodes.
    """
    order: dict[str, int] = {}
    for node in sorted(Path(root).glob("[0-9]*"), key=lambda path: int(path.name)):
        lines = (read_text(node / "properties") or "").splitlines()  # a container may not see every node
        values = {key: int(text) for key, _, text in (line.partition(" ") for line in lines) if text.isdigit()}
        if values.get("simd_count"):  # 0 is a CPU
            order[pci_address(values.get("domain", 0), values.get("location_id", 0))] = len(order)
    return order


def pci_address(domain: int, location: int) -> str:
    """Return a PCI address as Linux writes it.

    Args:
        domain: PCI domain.
        location: Bus, device and function, in 8, 5 and 3 bits.

    Example:
        >>> pci_address(0, 0xC100)
        '0000:c1:00.0'
    """
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7:x}"


def visible_gpus(gpus: list[AmdGpu]) -> list[AmdGpu]:
    """Return the GPUs that this process may use: torch's devices once HIP runs, else those the environment leaves.

    ROCR_VISIBLE_DEVICES is applied first, then HIP_VISIBLE_DEVICES or, without it, CUDA_VISIBLE_DEVICES: by
    place in what the one before left, or by UUID or its beginning, ending at the first entry that is not valid.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.hip and torch.cuda.is_available() and torch.cuda.is_initialized():
        known = {DeviceId("", "gpu", gpu.pci): DeviceInfo(gpu.name, pci=gpu.pci, ids=gpu.ids) for gpu in gpus}
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        own = {match.uid for properties in devices for match in own_gpus(known, *torch_ids(properties))}
        return [gpu for gpu in gpus if gpu.pci in own] or gpus
    chosen = sorted(gpus, key=lambda gpu: (gpu.order is None, gpu.order, gpu.pci))
    names = ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]
    if "HIP_VISIBLE_DEVICES" not in os.environ and not (torch is not None and torch.version.cuda):
        names.append("CUDA_VISIBLE_DEVICES")  # HIP heeds it too; next to a CUDA build of torch it is not meant
    for name in names:
        text = os.environ.get(name)
        if text is None:
            continue
        left: list[AmdGpu] = []
        for token in (t.strip() for t in text.split(",")):
            found = chosen[int(token) : int(token) + 1] if token.isdigit() else _by_uuid(chosen, token)
            if not found:
                break
            left += [gpu for gpu in found if gpu not in left]
        chosen = left
    return chosen


def _by_uuid(gpus: list[AmdGpu], token: str) -> list[AmdGpu]:
    """Return the one GPU whose UUID is the token or begins with it, as ROCr and HIP take it; else none."""
    start = token.lower()
    found = [gpu for gpu in gpus if any(uid.lower().startswith(start) for uid in gpu.ids)]
    return found if len(found) == 1 and len(start) > len("GPU-") else []


def no_visible_gpu(count: int) -> SourceUnavailable:
    """Return the exception for a machine whose GPUs are all hidden from this process."""
    return SourceUnavailable(
        Status.UNAVAILABLE,
        f"none of {count} AMD GPUs is visible to this process: see ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES",
    )
