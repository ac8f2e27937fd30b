"""Readings of devices, and the ids and names of the devices."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Literal

HOSTNAME_ENVIRONMENT = "ESTDGM_HOSTNAME"

Kind = Literal["gpu", "cpu", "dram"]
Method = Literal["counter", "integrated", "estimated"]
Scope = Literal["host", "process"]

KINDS: tuple[Kind, ...] = ("gpu", "cpu", "dram")
METHODS: tuple[Method, ...] = ("counter", "integrated", "estimated")
"""From best to worst."""


class Status(str, enum.Enum):
    """Outcome of one reading, or of the opening of one source."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    """The device exists and does not offer this."""
    NO_PERMISSION = "no_permission"
    UNAVAILABLE = "unavailable"
    """The driver, library or device is not there (any more): a later reading does not continue this one."""
    ERROR = "error"
    """A passing failure: the same device may answer the next time, and its counter ran on meanwhile."""


@dataclass(frozen=True, order=True)
class DeviceId:
    """Id of one device: the same hardware has the same id in every process of every run.

    Attributes:
        host: Name of the machine.
        kind: "gpu", "cpu" or "dram".
        uid: UUID, PCI address or zone name, never an index that an environment variable can renumber.
    """

    host: str
    kind: Kind
    uid: str


@dataclass(frozen=True)
class DeviceInfo:
    """Name and properties of one device.

    Attributes:
        name: Product name and measured quantity, for people.
        shared: Whether the reading includes the work of others: the parent of a MIG slice, both dies of an MI250.
        covers: Other kinds whose energy the reading includes; a Grace-Hopper module counter covers
            ("cpu", "dram"), so that sources of those kinds would count it again.
        pci: PCI address in lower case, "0000:c1:00.0"; None where there is none.
        ids: Further UUIDs and PCI addresses of compute devices whose energy the reading includes: the UUID
            where `DeviceId.uid` is a PCI address, MIG slices, the second die of an MI250.
    """

    name: str
    shared: bool = False
    covers: tuple[Kind, ...] = ()
    pci: str | None = None
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One reading of one device. A failed one holds None, never 0.

    Attributes:
        monotonic_ns: `time.monotonic_ns()` at the reading.
        energy_uj: Raw counter in microjoules, from an arbitrary origin.
        power_mw: Power in milliwatts.
        status: Outcome; anything but OK makes this a gap.
    """

    monotonic_ns: int
    energy_uj: int | None = None
    power_mw: int | None = None
    status: Status = Status.OK


def check_reading(reading: object) -> Reading:
    """Return a reading with its figures as Python ints: sums of fixed-width ones overflow, and NaN spreads.

    Raises:
        TypeError: It is no `Reading`, or a figure of it is no number.
        ValueError: A figure is NaN.
        OverflowError: A figure is infinite.
    """
    if not isinstance(reading, Reading):
        raise TypeError(f"expected a Reading, got {reading!r}")
    energy_uj, power_mw = (None if x is None else index(round(x)) for x in (reading.energy_uj, reading.power_mw))
    return replace(reading, monotonic_ns=index(round(reading.monotonic_ns)), energy_uj=energy_uj, power_mw=power_mw)


class SourceUnavailable(Exception):
    """Raised where a source cannot be used.

    Args:
        status: Reason for programs.
        reason: Reason for people.
    """

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[type[SourceUnavailable], tuple[Status, str]]:
        return type(self), (self.status, self.reason)


def hostname() -> str:
    """Return the `host` of this machine's devices: ESTDGM_HOSTNAME, else the system's host name.

    Processes that see the same host name are taken to share its devices; the variable tells machines apart
    that share a name, and joins containers of one machine that do not.
    """
    return os.environ.get(HOSTNAME_ENVIRONMENT) or socket.gethostname()


def torch_ids(properties: object) -> tuple[str | None, str | None]:
    """Return UUID and PCI address of a torch device; None where unknown.

    ROCm gives the 16 letters of its UUID where CUDA gives 16 bytes: they are put back into letters.

    Args:
        properties: Result of `torch.cuda.get_device_properties`.
    """
    uuid = getattr(properties, "uuid", None)
    text = None if uuid is None else str(uuid).lower()
    if text is not None:
        with contextlib.suppress(ValueError):
            letters = bytes.fromhex(text.replace("-", "")).decode("ascii")
            if re.fullmatch("[0-9a-f]{16}", letters.lower()):
                text = letters.lower()
    parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    domain, bus, device = (part if isinstance(part, int) else -1 for part in parts)
    return text, f"{domain:04x}:{bus:02x}:{device:02x}.0" if min(domain, bus, device) >= 0 else None


def own_gpus(
    infos: Mapping[DeviceId, DeviceInfo], torch_uuid: str | None, torch_pci: str | None = None
) -> list[DeviceId]:
    """Return the devices whose readings include the energy of one torch device; empty where none matches.

    NVIDIA GPUs and MIG slices match by UUID, AMD GPUs by UUID or PCI address. A UUID match wins over one by
    address, which the partitions of a GPU may share.

    Args:
        infos: Devices to choose from.
        torch_uuid: UUID of the torch device, as `torch_ids` gives it.
        torch_pci: PCI address of the torch device, as `torch_ids` gives it.

    Example:
        >>> gpu = DeviceId("host", "gpu", "0000:c1:00.0")
        >>> infos = {gpu: DeviceInfo("MI300X", pci="0000:c1:00.0", ids=("GPU-1122334455667788",))}
        >>> own_gpus(infos, "1122334455667788") == own_gpus(infos, None, "0000:c1:00.0") == [gpu]
        True
    """

    def bare(uid: str) -> str:
        return uid.lower().removeprefix("gpu-").removeprefix("mig-")

    gpus = {device: info for device, info in infos.items() if device.kind == "gpu"}
    for wanted in (torch_uuid, torch_pci):
        if wanted is None:
            continue
        found = [d for d, info in gpus.items() if bare(wanted) in map(bare, (d.uid, info.pci or "", *info.ids))]
        if found:
            return found
    return []
