"""A live look at the sensors of this machine: their power, and how often they renew it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy._source_set import SourceSet
from lightning_estdgm.energy.sources._protocol import EnergySource

PAUSE_S = 0.002
"""Pause between two looks: shorter than the update period of any sensor but RAPL (1 ms)."""


@dataclass
class DeviceProbe:
    """Readings of one device.

    Attributes:
        info: Name and properties of the device.
        watts: Mean power over the look; None where nothing could be read.
        period_s: Mean time between two new values, not shorter than the time between two looks; None where fewer
            than two came.
        status: Status of the last reading.
        reads: Number of readings.
        failed: Number of failed readings.
    """

    info: DeviceInfo
    watts: float | None = None
    period_s: float | None = None
    status: Status = Status.UNAVAILABLE
    reads: int = 0
    failed: int = 0


@dataclass
class Probe:
    """Readings of the sensors of a machine.

    Attributes:
        seconds: Duration of the look.
        sources: Sources that a run would use, with their devices.
        unavailable: Other sources, and why they are not used.
    """

    seconds: float
    sources: list[tuple[ActiveSource, dict[DeviceId, DeviceProbe]]] = field(default_factory=list)
    unavailable: list[UnavailableSource] = field(default_factory=list)

    def kinds(self, *, estimated: bool) -> dict[str, str]:
        """Return the kinds of devices that gave watts, with the sources that estimate them, or else measure them."""
        kinds: dict[str, list[str]] = {}
        for source, devices in self.sources:
            for device, seen in devices.items():
                if seen.watts is not None and (source.method == "estimated") == estimated:
                    for kind in (device.kind, *seen.info.covers):
                        kinds.setdefault(kind, []).append(source.name)
        return {kind: ", ".join(dict.fromkeys(names)) for kind, names in kinds.items()}

    @property
    def measurable(self) -> bool:
        """Whether the energy of at least one device is measured, not merely estimated."""
        return bool(self.kinds(estimated=False))


class _Changes:
    """Times at which the value of one device changed."""

    def __init__(self) -> None:
        self._value: tuple[int | None, int | None] | None = None
        self._at_ns: list[int] = []

    def add(self, reading: Reading) -> None:
        value = (reading.energy_uj, reading.power_mw)
        if self._value is not None and value != self._value:
            self._at_ns.append(reading.monotonic_ns)
        self._value = value

    def period_s(self) -> float | None:
        if len(self._at_ns) < 2:
            return None
        return (self._at_ns[-1] - self._at_ns[0]) / (len(self._at_ns) - 1) / 1e9


def probe(sources: Iterable[tuple[str, EnergySource | SourceUnavailable]], seconds: float = 1.0) -> Probe:
    """Open the sources as a run would, and read them for `seconds`.

    Args:
        sources: Names with sources, or with the reason why there is none, as `resolve` gives them.
        seconds: Duration of the look; each device is read at least twice.

    Raises:
        ValueError: `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds!r}")
    opened = SourceSet(sources)
    opened.open()
    try:
        result = Probe(seconds, unavailable=opened.unavailable)
        for source in opened.active:
            result.sources.append((source, {d: DeviceProbe(info) for d, info in source.devices.items()}))
        _watch(result, opened, seconds)
    finally:
        opened.close()
    return result


def _watch(result: Probe, opened: SourceSet, seconds: float) -> None:
    accumulator = Accumulator(max_interval_s=max(5.0, seconds))
    opened.expect_in(accumulator)
    changes = {device: _Changes() for _, devices in result.sources for device in devices}
    begin_ns = time.monotonic_ns()
    accumulator.switch(begin_ns, "", "")
    done = False
    while not done:
        # A last look comes after the time is up, so that there are two of every device.
        done = time.monotonic_ns() - begin_ns > seconds * 1e9
        readings: dict[DeviceId, Reading] = {}
        for source, devices in result.sources:
            try:
                got = opened.read(source)
            except Exception:  # a vendor's library may fail in any way: its devices count as failed
                got = {}
            for device, seen in devices.items():
                reading = got.get(device) or Reading(time.monotonic_ns(), status=Status.ERROR)
                readings[device] = reading
                seen.reads += 1
                seen.status = reading.status
                if reading.status is Status.OK:
                    changes[device].add(reading)
                else:
                    seen.failed += 1
        accumulator.update(time.monotonic_ns(), readings)
        if not done:
            time.sleep(PAUSE_S)
    totals = accumulator.totals()
    energy_uj = totals.device_uj()
    for _, devices in result.sources:
        for device, seen in devices.items():
            covered_ns = totals.device_ns.get(device)
            if covered_ns:
                seen.watts = energy_uj.get(device, 0) * 1000 / covered_ns
            seen.period_s = changes[device].period_s()
