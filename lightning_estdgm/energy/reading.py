"""What an energy source is, and which ones this machine has.

A source is one module of this package that exposes ``SOURCE`` (a class or factory that takes no arguments),
or an entry point of the group ``lightning_estdgm.energy_sources``. Adding a vendor is adding a file: nothing
here changes.

Sources return raw integers and a status; they never decide what a difference between two readings means.
That is the accumulator's work (`lightning_estdgm.energy.accumulator`).
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import pkgutil
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal, Protocol, runtime_checkable

__all__ = [
    "ENTRY_POINT_GROUP",
    "DeviceId",
    "DeviceInfo",
    "EnergySource",
    "Kind",
    "Method",
    "Reading",
    "Scope",
    "SourceUnavailable",
    "Status",
    "check_source",
    "discover",
    "hostname",
    "own_gpus",
    "resolve",
    "torch_ids",
]

ENTRY_POINT_GROUP = "lightning_estdgm.energy_sources"
HOSTNAME_ENVIRONMENT = "ESTDGM_HOSTNAME"

Kind = Literal["gpu", "cpu", "dram"]
Method = Literal["counter", "integrated", "estimated"]
Scope = Literal["host", "process"]

KINDS: tuple[Kind, ...] = ("gpu", "cpu", "dram")
METHODS: tuple[Method, ...] = ("counter", "integrated", "estimated")


class Status(str, enum.Enum):
    """How one reading, or the opening of one source, went."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    """The device exists and does not offer this."""
    NO_PERMISSION = "no_permission"
    UNAVAILABLE = "unavailable"
    """The driver, library or device is not there (any more): what is read later does not continue this."""
    ERROR = "error"
    """A passing failure: the same device may answer the next time, and its counter ran on meanwhile."""


@dataclass(frozen=True, order=True)
class DeviceId:
    """One device: the same hardware has the same id in every process of every run.

    Attributes:
        host: name of the machine.
        kind: "gpu", "cpu" or "dram".
        uid: UUID, PCI address or zone name, never an index that an environment variable can renumber.
    """

    host: str
    kind: Kind
    uid: str


@dataclass(frozen=True)
class DeviceInfo:
    """What people, and the choice of devices, need to know of one device.

    Attributes:
        name: product name and what is read, for people.
        shared: the reading also holds work of others: the parent of a MIG slice, both dies of an MI250.
        covers: other kinds whose energy is in this reading too; a Grace-Hopper module counter covers
            ("cpu", "dram"), so that sources of those kinds would count it again.
        pci: PCI address in lower case, "0000:c1:00.0"; None where there is none.
        ids: further UUIDs and PCI addresses of compute devices whose energy this reading holds: the UUID
            where `DeviceId.uid` is a PCI address, MIG slices, the second die of an MI250.
    """

    name: str
    shared: bool = False
    covers: tuple[Kind, ...] = ()
    pci: str | None = None
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One look at one device. A failed one holds None, never 0.

    Attributes:
        monotonic_ns: `time.monotonic_ns()` at the reading.
        energy_uj: raw counter in microjoules, from an arbitrary origin.
        power_mw: power in milliwatts.
        status: anything but OK makes this a gap.
    """

    monotonic_ns: int
    energy_uj: int | None = None
    power_mw: int | None = None
    status: Status = Status.OK


class SourceUnavailable(Exception):
    """A source that cannot be used here, and why: `status` for programs, `reason` for people."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[type[SourceUnavailable], tuple[Status, str]]:
        return type(self), (self.status, self.reason)


@runtime_checkable
class EnergySource(Protocol):
    """One vendor's way to read energy.

    Attributes:
        name: unique, lower case, as users write it: "nvml".
        method: "counter" (the hardware adds up the joules), "integrated" (power samples are integrated here)
            or "estimated" (nothing was measured). A source of several devices names the weakest of theirs.
        scope: "host" if the devices are shared by all processes of a machine, so that one process must read
            them for all; "process" if a reading covers the reading process only.
        update_period_s: how often the hardware renews the value; a window shorter than this may read zero.
        driver: driver and version behind the readings, known after `open`; "" where unknown.
    """

    name: str
    method: Method
    scope: Scope
    update_period_s: float
    driver: str

    def open(self) -> None:
        """Make the source ready, or raise `SourceUnavailable`. Imports vendor libraries here, not earlier."""

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """The devices that `read` reports."""

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """What to add when the counter wrapped, in microjoules; None: going back is a reset."""

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read these devices now; None: all. Never raises for a device that fails: its reading says so."""

    def close(self) -> None:
        """Release what `open` took. May be called twice."""


def hostname() -> str:
    """The `host` of the devices of this machine: ESTDGM_HOSTNAME, else the system's host name.

    Processes that see the same host name are taken to share its devices; the variable tells machines apart
    that share a name, and joins containers of one machine that do not.
    """
    return os.environ.get(HOSTNAME_ENVIRONMENT) or socket.gethostname()


def torch_ids(properties: object) -> tuple[str | None, str | None]:
    """UUID and PCI address of a torch device, from `torch.cuda.get_device_properties`; None where unknown.

    ROCm gives the 16 letters of its UUID where CUDA gives 16 bytes: they are put back into letters.
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
    """The devices whose reading holds the energy of one torch device, known by what `torch_ids` gives.

    NVIDIA GPUs and MIG slices match by UUID, AMD GPUs by UUID or PCI address. Empty where none matches.
    A UUID match wins over one by address, which the partitions of a GPU may share.

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


def check_source(source: object) -> EnergySource:
    """Return `source` if it follows the `EnergySource` protocol.

    Raises:
        TypeError: a member is missing, or the class was given in place of an instance.
        ValueError: `method`, `scope` or `update_period_s` has no meaning.
    """
    if isinstance(source, type):
        raise TypeError(f"expected an instance of an energy source, got the class {source.__name__}")
    members = (
        "name",
        "method",
        "scope",
        "update_period_s",
        "driver",
        "open",
        "devices",
        "wrap_range_uj",
        "read",
        "close",
    )
    missing = [m for m in members if not hasattr(source, m)]
    if missing or not isinstance(source, EnergySource):
        raise TypeError(
            f"expected an energy source with {', '.join(members)}; {type(source).__name__} lacks {', '.join(missing)}"
        )
    if not isinstance(source.name, str) or not source.name:
        raise ValueError(f"an energy source's name must be a non-empty string, got {source.name!r}")
    if source.method not in METHODS:
        raise ValueError(f"source {source.name!r}: method must be one of {METHODS}, got {source.method!r}")
    if source.scope not in ("host", "process"):
        raise ValueError(f"source {source.name!r}: scope must be 'host' or 'process', got {source.scope!r}")
    if not source.update_period_s >= 0:
        raise ValueError(f"source {source.name!r}: update_period_s must be >= 0, got {source.update_period_s!r}")
    return source


def discover() -> list[tuple[str, EnergySource | SourceUnavailable]]:
    """Every known source by name, not opened yet; in place of one that cannot even be made, the reason.

    Counters come before integrated power, and estimates last, so that the first to claim a device is the
    better one.

    Example:
        >>> from lightning_estdgm.energy import discover
        >>> names = [name for name, _ in discover()]
        >>> names.index("nvml") < names.index("cpu-estimate")
        True
    """
    found: dict[str, EnergySource | SourceUnavailable] = {}

    def add(label: str, make: object) -> None:
        try:
            # A source of another project may fail in any way; that must cost its joules, never the training
            # run.
            source = check_source(make() if callable(make) else make)
        except Exception as e:
            found.setdefault(label, SourceUnavailable(Status.ERROR, f"{type(e).__name__}: {e}"))
        else:
            found.setdefault(source.name, source)

    for module in pkgutil.iter_modules(__path__):
        try:
            loaded = importlib.import_module(f"{__name__}.{module.name}")
        except Exception as e:
            found[module.name] = SourceUnavailable(Status.ERROR, f"import failed: {type(e).__name__}: {e}")
            continue
        if hasattr(loaded, "SOURCE"):
            add(module.name, loaded.SOURCE)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            factory = point.load()
        except Exception as e:
            found.setdefault(point.name, SourceUnavailable(Status.ERROR, f"import failed: {type(e).__name__}: {e}"))
        else:
            add(point.name, factory)

    def rank(item: tuple[str, EnergySource | SourceUnavailable]) -> tuple[int, str]:
        name, source = item
        return 0 if isinstance(source, SourceUnavailable) else METHODS.index(source.method), name

    return sorted(found.items(), key=rank)


def resolve(
    sources: Iterable[str | EnergySource] | None,
) -> list[tuple[str, EnergySource | SourceUnavailable]]:
    """Turn what a user gave into sources: None for all that are known, else names or objects, in that order.

    Raises:
        TypeError: not an iterable of names and sources, or an object that does not follow the protocol.
        ValueError: a name that no source has, or a name given twice.
    """
    if sources is None:
        return discover()
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        raise TypeError(f"sources must be None or a list of names and energy sources, got {sources!r}")
    known: dict[str, EnergySource | SourceUnavailable] | None = None
    chosen: list[tuple[str, EnergySource | SourceUnavailable]] = []
    for item in sources:
        if isinstance(item, str):
            known = dict(discover()) if known is None else known
            if item not in known:
                raise ValueError(f"unknown energy source {item!r}; known are {', '.join(sorted(known))}")
            chosen.append((item, known[item]))
        else:
            source = check_source(item)
            chosen.append((source.name, source))
    names = [name for name, _ in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"energy sources given twice: {', '.join(twice)}")
    return chosen
