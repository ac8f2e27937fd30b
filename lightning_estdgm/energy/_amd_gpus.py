"""Source of energy behind AMD's two libraries: units of their counters, and checks on them.

The energy accumulator counts in units of 2^-16 J; the libraries report a rounded 15.3 microjoules.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning_estdgm.energy._amd_visibility import AmdGpu, no_visible_gpu, visible_gpus
from lightning_estdgm.energy._counter_check import STILL_NS, CounterCheck, is_plausible
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

_INVALID = {0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF}  # "no value", as wide as the field happens to be


class AmdLibraryError(Exception):
    """Raised where a call of an AMD library fails.

    Args:
        status: Status of the reading.
        reason: Reason for people.
        stale: Whether the handle is void, because somebody in this process shut the library down or the GPU was
            lost: the library has to be opened anew.
    """

    def __init__(self, status: Status, reason: str, *, stale: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.stale = stale


class AmdLibrary(Protocol):
    """Binding to one AMD library. The calls raise `AmdLibraryError`.

    Attributes:
        name: Name of the source.
    """

    name: str

    def load(self) -> tuple[str, list[AmdGpu]]:
        """Return driver and version, and the GPUs; raise `SourceUnavailable` where there are none."""

    def energy(self, gpu: AmdGpu) -> tuple[int, float]:
        """Return the accumulator, and the microjoules of one unit as the library reports them."""

    def power_mw(self, gpu: AmdGpu) -> int:
        """Return the power of the socket in milliwatts."""

    def close(self) -> None:
        """Release what `load` took."""


def answering(handles: Iterable[Any], describe: Callable[[Any], AmdGpu]) -> list[AmdGpu]:
    """Describe the GPUs that answer: one that is lost must not take the readings of the others with it.

    Raises:
        AmdLibraryError: None of them answers.
    """
    found: list[AmdGpu] = []
    lost: list[AmdLibraryError] = []
    for handle in handles:
        try:
            found.append(describe(handle))
        except AmdLibraryError as e:
            lost.append(e)
    if lost and not found:
        raise lost[0]
    return found


def valid(value: object) -> int | None:
    """Return `value` if it is a number and not one of the patterns that stand for "no value", else None."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value in _INVALID:
        return None
    return value


def ticks_to_uj(ticks: int, resolution_uj: float) -> int:
    """Convert accumulator units to microjoules: exactly 2^-16 J each where the library says 15.3 microjoules.

    Example:
        >>> ticks_to_uj(65536, 15.300000190734863)
        1000000
    """
    return ticks * 15625 // 1024 if abs(resolution_uj - 15.3) < 0.1 else int(ticks * resolution_uj)


_Mode = Literal["counter", "power"]


@dataclass
class _Sensor:
    gpu: AmdGpu
    mode: _Mode | None = None
    text: str = ""
    check: CounterCheck | None = None
    others: list[AmdGpu] = field(default_factory=list)  # dies and partitions whose energy is in this reading


class AmdGpus:
    """AMD GPUs that this process may use, through one of AMD's libraries.

    A counter that stands still when the source is opened is passed over for power; one that stops later, or
    jumps, is a gap. Dies and partitions without a sensor of their own belong to the GPU that reports for them.

    Args:
        library: Binding to the library.
    """

    scope: Scope = "host"
    update_period_s = 0.1

    def __init__(self, library: AmdLibrary) -> None:
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
        """Load the library, find the GPUs, and choose once how each is read."""
        self._pid = os.getpid()
        try:
            self.driver, gpus = self._library.load()
            found = visible_gpus(gpus)
            if not found:
                raise no_visible_gpu(len(gpus))
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
        """Return the GPUs by PCI address."""
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
        """Return None: 64 bits never wrap in practice, so a counter that goes back was reset."""
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read the GPUs, by one call each."""
        return {d: self._read(sensor) for d, sensor in self._sensors.items() if devices is None or d in devices}

    def close(self) -> None:
        """Release the library, in the process that opened it."""
        if self._pid == os.getpid():
            self._library.close()
        self._pid = None
        self._sensors = {}

    def _read(self, sensor: _Sensor) -> Reading:
        def power_mw() -> int | None:
            try:
                return self._power(sensor.gpu)
            except AmdLibraryError:
                return None

        try:
            if sensor.mode == "power":
                power = self._call(sensor, self._power)
                return Reading(time.monotonic_ns(), power_mw=power)
            energy_uj = self._call(sensor, self._energy)
        except AmdLibraryError as e:
            return Reading(time.monotonic_ns(), status=e.status)
        now_ns = time.monotonic_ns()
        assert sensor.check is not None
        status = sensor.check.status(energy_uj, now_ns, power_mw)
        return Reading(now_ns, energy_uj=energy_uj if status is Status.OK else None, status=status)

    def _call(self, sensor: _Sensor, function: Callable[[AmdGpu], int]) -> int:
        if self._pid == os.getpid() and sensor.gpu.handle is not None:
            try:
                return function(sensor.gpu)
            except AmdLibraryError as e:
                if not e.stale:
                    raise
        # Forked, shut down by somebody else, or lost: open it for this process, and find the handles anew.
        try:
            _, gpus = self._library.load()
        except SourceUnavailable as e:
            raise AmdLibraryError(e.status, e.reason) from None
        self._pid = os.getpid()
        handles = {gpu.pci: gpu.handle for gpu in gpus}
        for each in self._sensors.values():
            each.gpu.handle = handles.get(each.gpu.pci)
        if sensor.gpu.handle is None:
            raise AmdLibraryError(Status.UNAVAILABLE, f"{sensor.gpu.pci} is gone")
        return function(sensor.gpu)

    def _energy(self, gpu: AmdGpu) -> int:
        ticks, resolution_uj = self._library.energy(gpu)
        if valid(ticks) is None or not resolution_uj > 0:
            raise AmdLibraryError(Status.ERROR, f"not an energy: {ticks} units of {resolution_uj} uJ")
        return ticks_to_uj(ticks, resolution_uj)

    def _power(self, gpu: AmdGpu) -> int:
        power = self._library.power_mw(gpu)
        if not is_plausible(power):
            raise AmdLibraryError(Status.ERROR, f"it reports {power / 1000:g} W")
        return power

    def _choose(self, gpus: list[AmdGpu]) -> tuple[list[_Sensor], AmdLibraryError]:
        """Choose how each GPU is read, and join those without a sensor to the one that reports for them."""
        refused = AmdLibraryError(Status.UNSUPPORTED, "no sensor")
        first: dict[str, int] = {}
        for gpu in gpus:
            try:
                first[gpu.pci] = self._energy(gpu)
            except AmdLibraryError as e:
                refused = e
        moved: set[str] = set()
        end_ns = time.monotonic_ns() + STILL_NS
        while len(moved) < len(first):
            for gpu in gpus:
                if gpu.pci in first and gpu.pci not in moved:
                    try:
                        if self._energy(gpu) != first[gpu.pci]:
                            moved.add(gpu.pci)
                    except AmdLibraryError:
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
                except AmdLibraryError as e:
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


def _same_package(one: AmdGpu, other: AmdGpu) -> bool:
    """Return whether one sensor may report for both GPUs.

    Partitions of a GPU share its address but for the function; an MI250 is two dies, and the first reports both.
    """
    if one.pci[:-1] == other.pci[:-1]:
        return True
    return "MI250" in one.name.upper() and "MI250" in other.name.upper()
