"""What AMD's two libraries have in common: which GPUs, what their counters mean, and when not to believe them.

A GPU's id is its PCI address, which amdsmi, ROCm-SMI and the kernel's hwmon files all give, so that a GPU which
several of them offer is read once.

The energy accumulator counts in units of 2^-16 J; the libraries report a rounded 15.3 microjoules.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning_estdgm.energy._counter_check import MOST_W, STILL_NS, CounterCheck
from lightning_estdgm.energy._sysfs import read_text
from lightning_estdgm.energy.reading import (
    DeviceId,
    DeviceInfo,
    Kind,
    Method,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
    hostname,
    own_gpus,
    torch_ids,
)

__all__ = [
    "AmdGpus",
    "Gpu",
    "Library",
    "LibraryError",
    "hidden",
    "hip_order",
    "pci_address",
    "ticks_to_uj",
    "valid",
    "visible",
]

KFD = "/sys/class/kfd/kfd/topology/nodes"

_INVALID = {0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF}  # "no value", as wide as the field happens to be


class LibraryError(Exception):
    """A call of an AMD library that failed.

    Args:
        status: what it means for the reading.
        reason: for people.
        stale: the handle is void, because somebody in this process shut the library down or the GPU was lost:
            open it anew.
    """

    def __init__(self, status: Status, reason: str, *, stale: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.stale = stale


@dataclass
class Gpu:
    """A GPU as a library shows it.

    Attributes:
        handle: what the library's calls take.
        pci: "0000:c1:00.0".
        name: product name.
        ids: its UUIDs.
        order: its place in HIP's order; None where the library does not know it.
    """

    handle: Any
    pci: str
    name: str
    ids: tuple[str, ...] = ()
    order: int | None = None


class Library(Protocol):
    """One AMD library. The calls raise `LibraryError`."""

    name: str

    def load(self) -> tuple[str, list[Gpu]]:
        """Driver and version, and the GPUs; raises `SourceUnavailable` where there are none."""

    def energy(self, gpu: Gpu) -> tuple[int, float]:
        """Accumulator, and the microjoules of one unit as the library reports them."""

    def power_mw(self, gpu: Gpu) -> int:
        """Power of the socket in milliwatts."""

    def close(self) -> None:
        """Give back what `load` took."""


def valid(value: object) -> int | None:
    """`value` if it is a number and not one of the patterns that stand for "no value", else None."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value in _INVALID:
        return None
    return value


def ticks_to_uj(ticks: int, resolution_uj: float) -> int:
    """Accumulator units as microjoules: exactly 2^-16 J each where the library says 15.3 microjoules.

    Example:
        >>> ticks_to_uj(65536, 15.300000190734863)
        1000000
    """
    return ticks * 15625 // 1024 if abs(resolution_uj - 15.3) < 0.1 else int(ticks * resolution_uj)


def hip_order(root: str | os.PathLike[str] = KFD) -> dict[str, int]:
    """PCI address of each GPU that ROCm's kernel driver knows, with its place in HIP's order."""
    order: dict[str, int] = {}
    for node in sorted(Path(root).glob("[0-9]*"), key=lambda path: int(path.name)):
        lines = (read_text(node / "properties") or "").splitlines()  # a container may not see every node
        values = {key: int(text) for key, _, text in (line.partition(" ") for line in lines) if text.isdigit()}
        if values.get("simd_count"):  # 0 is a CPU
            order[pci_address(values.get("domain", 0), values.get("location_id", 0))] = len(order)
    return order


def pci_address(domain: int, location: int) -> str:
    """The address as Linux writes it; `location` holds bus, device and function.

    Example:
        >>> pci_address(0, 0xC100)
        '0000:c1:00.0'
    """
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7:x}"


def visible(gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs that this process may use: torch's devices once HIP runs, else what the environment leaves.

    ROCR_VISIBLE_DEVICES is applied first, then HIP_VISIBLE_DEVICES or, without it, CUDA_VISIBLE_DEVICES: by
    place in what the one before left, or by UUID, ending at the first entry that is not valid.
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
        left: list[Gpu] = []
        for token in (t.strip() for t in text.split(",")):
            if token.isdigit():
                found = chosen[int(token) : int(token) + 1]
            else:
                found = [gpu for gpu in chosen if token.lower() in (uid.lower() for uid in gpu.ids)]
            if not found:
                break
            left += [gpu for gpu in found if gpu not in left]
        chosen = left
    return chosen


def hidden(count: int) -> SourceUnavailable:
    """The reason where there are GPUs, and none for this process."""
    return SourceUnavailable(
        Status.UNAVAILABLE,
        f"none of {count} AMD GPUs is visible to this process: see ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES",
    )


_Mode = Literal["counter", "power"]


@dataclass
class _Sensor:
    gpu: Gpu
    mode: _Mode | None = None
    text: str = ""
    check: CounterCheck | None = None
    others: list[Gpu] = field(default_factory=list)  # dies and partitions whose energy is in this reading


class AmdGpus:
    """The AMD GPUs that this process may use, through one of AMD's libraries.

    A counter that stands still when the source is opened is passed over for power; one that stops later, or
    jumps, is a gap. Dies and partitions without a sensor of their own belong to the GPU that reports for them.

    Args:
        library: the binding.
    """

    scope: Scope = "host"
    update_period_s = 0.1

    def __init__(self, library: Library) -> None:
        self.name = library.name
        self.driver = ""
        self._library = library
        self._sensors: dict[DeviceId, _Sensor] = {}
        self._pid: int | None = None

    @property
    def method(self) -> Method:
        """ "counter" if every GPU has one that counts."""
        return "integrated" if any(s.mode == "power" for s in self._sensors.values()) else "counter"

    def open(self) -> None:
        """Load the library, find the GPUs, and settle once how each is read."""
        self._pid = os.getpid()
        try:
            self.driver, gpus = self._library.load()
            found = visible(gpus)
            if not found:
                raise hidden(len(gpus))
            sensors, refused = self._choose(sorted(gpus, key=lambda gpu: gpu.pci))
            wanted = {gpu.pci for gpu in found}
            sensors = [s for s in sensors if wanted & {gpu.pci for gpu in (s.gpu, *s.others)}]
            if not sensors:
                raise SourceUnavailable(
                    refused.status, f"{found[0].name} at {found[0].pci} gives neither energy nor power: {refused}"
                )
        except BaseException:
            self.close()
            raise
        host = hostname()
        self._sensors = {DeviceId(host, "gpu", s.gpu.pci): s for s in sensors}

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """GPUs by PCI address."""
        infos = {}
        for device, sensor in self._sensors.items():
            every = [sensor.gpu, *sensor.others]
            # MI300A: cores, graphics and memory in one socket, read as one.
            covers: tuple[Kind, ...] = ("cpu", "dram") if "MI300A" in sensor.gpu.name.upper() else ()
            text = f"{sensor.gpu.name}, {sensor.text}"
            if sensor.others:
                text += f", with {', '.join(gpu.pci for gpu in sensor.others)} in the same reading"
            if covers:
                text += " of the whole socket (cores and memory included)"
            ids = [uid for gpu in every for uid in gpu.ids] + [gpu.pci for gpu in sensor.others]
            infos[device] = DeviceInfo(
                text, shared=bool(sensor.others), covers=covers, pci=sensor.gpu.pci, ids=tuple(dict.fromkeys(ids))
            )
        return infos

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Unknown: 64 bits never wrap in practice, so a counter that goes back was reset."""
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """One call per GPU."""
        return {d: self._read(sensor) for d, sensor in self._sensors.items() if devices is None or d in devices}

    def close(self) -> None:
        """Give the library back, in the process that opened it."""
        if self._pid == os.getpid():
            self._library.close()
        self._pid = None
        self._sensors = {}

    def _read(self, sensor: _Sensor) -> Reading:
        def power_mw() -> int | None:
            try:
                return self._power(sensor.gpu)
            except LibraryError:
                return None

        try:
            if sensor.mode == "power":
                power = self._call(sensor, self._power)
                return Reading(time.monotonic_ns(), power_mw=power)
            energy_uj = self._call(sensor, self._energy)
        except LibraryError as e:
            return Reading(time.monotonic_ns(), status=e.status)
        now_ns = time.monotonic_ns()
        assert sensor.check is not None
        status = sensor.check.status(energy_uj, now_ns, power_mw)
        return Reading(now_ns, energy_uj=energy_uj if status is Status.OK else None, status=status)

    def _call(self, sensor: _Sensor, function: Callable[[Gpu], int]) -> int:
        if self._pid == os.getpid() and sensor.gpu.handle is not None:
            try:
                return function(sensor.gpu)
            except LibraryError as e:
                if not e.stale:
                    raise
        # Forked, shut down by somebody else, or lost: open it for this process, and find the handles anew.
        try:
            _, gpus = self._library.load()
        except SourceUnavailable as e:
            raise LibraryError(e.status, e.reason) from None
        self._pid = os.getpid()
        handles = {gpu.pci: gpu.handle for gpu in gpus}
        for each in self._sensors.values():
            each.gpu.handle = handles.get(each.gpu.pci)
        if sensor.gpu.handle is None:
            raise LibraryError(Status.UNAVAILABLE, f"{sensor.gpu.pci} is gone")
        return function(sensor.gpu)

    def _energy(self, gpu: Gpu) -> int:
        ticks, resolution_uj = self._library.energy(gpu)
        if valid(ticks) is None or not resolution_uj > 0:
            raise LibraryError(Status.ERROR, f"not an energy: {ticks} units of {resolution_uj} uJ")
        return ticks_to_uj(ticks, resolution_uj)

    def _power(self, gpu: Gpu) -> int:
        power = self._library.power_mw(gpu)
        # What is switched on draws some: 0 W is a sensor that does not answer, 65535 W one that has no value.
        if not 0 < power <= MOST_W * 1000:
            raise LibraryError(Status.ERROR, f"it reports {power / 1000:g} W")
        return power

    def _choose(self, gpus: list[Gpu]) -> tuple[list[_Sensor], LibraryError]:
        """How each GPU is read; those without a sensor joined to the one that reports for them."""
        refused = LibraryError(Status.UNSUPPORTED, "no sensor")
        first: dict[str, int] = {}
        for gpu in gpus:
            try:
                first[gpu.pci] = self._energy(gpu)
            except LibraryError as e:
                refused = e
        moved: set[str] = set()
        end_ns = time.monotonic_ns() + STILL_NS
        while len(moved) < len(first):
            for gpu in gpus:
                if gpu.pci in first and gpu.pci not in moved:
                    try:
                        if self._energy(gpu) != first[gpu.pci]:
                            moved.add(gpu.pci)
                    except LibraryError:
                        continue
            if time.monotonic_ns() > end_ns:
                break
            if len(moved) < len(first):
                time.sleep(0.005)
        sensors: list[_Sensor] = []
        for gpu in gpus:
            sensor = _Sensor(gpu, check=CounterCheck(f"{gpu.name} at {gpu.pci}"))
            if gpu.pci in moved:
                sensor.mode, sensor.text = "counter", "energy counter"
            else:
                try:
                    self._power(gpu)
                except LibraryError as e:
                    if refused.status is not Status.NO_PERMISSION:  # what somebody can mend is told first
                        refused = e
                else:
                    why = " (its energy counter stands still)" if gpu.pci in first else ""
                    sensor.mode, sensor.text = "power", f"power{why}"
            before = next((s for s in reversed(sensors) if _same_package(s.gpu, gpu)), None)
            if before is not None and (sensor.mode is None or before.gpu.pci[:-1] == gpu.pci[:-1]):
                before.others.append(gpu)
            elif sensor.mode is not None:
                sensors.append(sensor)
        return sensors, refused


def _same_package(one: Gpu, other: Gpu) -> bool:
    """Partitions of a GPU share its address but for the function; an MI250 is two dies, the first reports both."""
    if one.pci[:-1] == other.pci[:-1]:
        return True
    return "MI250" in one.name.upper() and "MI250" in other.name.upper()
