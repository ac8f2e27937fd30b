"""A live look at the sensors of this machine, as a run would use them: what they read, and how often they renew it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_estdgm.energy.accumulator import Accumulator
from lightning_estdgm.energy.device_assignment import Opened
from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy.sampler import Absent, Meter
from lightning_estdgm.energy.sources.protocol import EnergySource

__all__ = ["DeviceProbe", "Probe", "probe"]

PAUSE_S = 0.002
"""Between two looks: shorter than any sensor but RAPL (1 ms) renews its value."""


@dataclass
class DeviceProbe:
    """What one device showed.

    Attributes:
        info: what is known of it.
        watts: mean power over the look; None where nothing could be read.
        period_s: mean time between two new values; None where fewer than two came. It cannot be seen shorter
            than the time between two looks.
        status: of the last reading.
        reads: how often it was read.
        failed: how many of these failed.
    """

    info: DeviceInfo
    watts: float | None = None
    period_s: float | None = None
    status: Status = Status.UNAVAILABLE
    reads: int = 0
    failed: int = 0


@dataclass
class Probe:
    """What the sensors of a machine showed.

    Attributes:
        seconds: how long they were looked at.
        sources: those that a run would use, with their devices.
        absent: the others, and why.
    """

    seconds: float
    sources: list[tuple[Opened, dict[DeviceId, DeviceProbe]]] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def kinds(self, *, estimated: bool) -> dict[str, str]:
        """Kinds of devices that gave watts, with the sources: only those that estimate, or only those that measure."""
        kinds: dict[str, list[str]] = {}
        for source, devices in self.sources:
            for device, seen in devices.items():
                if seen.watts is not None and (source.method == "estimated") == estimated:
                    for kind in (device.kind, *seen.info.covers):
                        kinds.setdefault(kind, []).append(source.name)
        return {kind: ", ".join(dict.fromkeys(names)) for kind, names in kinds.items()}

    @property
    def measurable(self) -> bool:
        """True if at least one device's energy is measured, not merely estimated."""
        return bool(self.kinds(estimated=False))


class _Changes:
    """When one device's value became another one."""

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
        sources: names with sources, or with the reason why there is none, as `resolve` gives them.
        seconds: how long to look; each device is read at least twice.

    Raises:
        ValueError: `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds!r}")
    candidates = list(sources)
    by_name = {name: source for name, source in candidates if not isinstance(source, SourceUnavailable)}
    meter = Meter(candidates, interval_s=seconds)
    meter.open()
    try:
        result = Probe(seconds, absent=meter.absent)
        for opened in meter.opened:
            result.sources.append((opened, {d: DeviceProbe(info) for d, info in opened.devices.items()}))
        _watch(result, by_name, seconds)
    finally:
        meter.stop()
    return result


def _watch(result: Probe, by_name: dict[str, EnergySource], seconds: float) -> None:
    accumulator = Accumulator(max_interval_s=max(5.0, seconds))
    changes: dict[DeviceId, _Changes] = {}
    for opened, devices in result.sources:
        for device in devices:
            wrap_range_uj = by_name[opened.name].wrap_range_uj(device)
            accumulator.add_device(device, source=opened.name, method=opened.method, wrap_range_uj=wrap_range_uj)
            changes[device] = _Changes()
    begin_ns = time.monotonic_ns()
    accumulator.switch(begin_ns, "", "")
    done = False
    while not done:
        # A last look comes after the time is up, so that there are two of every device.
        done = time.monotonic_ns() - begin_ns > seconds * 1e9
        readings: dict[DeviceId, Reading] = {}
        for opened, devices in result.sources:
            try:
                got = by_name[opened.name].read()
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
