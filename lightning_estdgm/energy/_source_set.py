"""A set of open energy sources, and the choice of the devices that each of them reads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping

from lightning_estdgm.energy._accumulator import MAX_WRAP_POWER_W, Accumulator
from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource
from lightning_estdgm.energy._reading import (
    KINDS,
    DeviceId,
    DeviceInfo,
    Reading,
    SourceUnavailable,
    Status,
    check_reading,
)
from lightning_estdgm.energy.sources._protocol import EnergySource, check_source

Select = Callable[[EnergySource, Mapping[DeviceId, DeviceInfo]], Collection[DeviceId]]
"""Choice of the devices of a source that this process reads."""


class SourceSet:
    """Sources of one process, opened together; each device is read by one of them.

    A device is read by the first source that offers it. An estimate is dropped for a kind that is measured, and
    every source for a kind whose energy another reading includes (a module counter).

    Args:
        candidates: Names with sources, or with the reason why there is none, as `resolve` gives them.

    Attributes:
        active: Sources in use, with the devices that each reads. The list stays after `close`.
        unavailable: Sources that are not used.
    """

    def __init__(self, candidates: Iterable[tuple[str, EnergySource | SourceUnavailable]]) -> None:
        self._candidates = list(candidates)
        self._sources: dict[str, EnergySource] = {}
        self._wrap_uj: dict[DeviceId, int | None] = {}
        self.active: list[ActiveSource] = []
        self.unavailable: list[UnavailableSource] = []

    def __bool__(self) -> bool:
        """Return whether any source is open."""
        return bool(self._sources)

    def open(self, select: Select | None = None) -> None:
        """Open the sources and choose what each reads; a source that fails becomes an unavailable one.

        Args:
            select: Narrows the devices that are read of a source; None keeps all.
        """
        found: list[tuple[EnergySource, dict[DeviceId, DeviceInfo]]] = []
        for name, source in self._candidates:
            try:
                if isinstance(source, SourceUnavailable):
                    raise source
                found.append((source, _open(source)))
            except Exception as e:
                self._drop(name, e)
        # Estimates last, whatever the order they were named in: only then is it known what is measured.
        found.sort(key=lambda item: item[0].method == "estimated")
        held: dict[str, str] = {
            kind: source.name for source, devices in found for info in devices.values() for kind in info.covers
        }
        measured = dict(held)
        taken: set[DeviceId] = set()
        for source, devices in found:
            try:
                devices = _choose(source, devices, held, measured, taken, select)
                self._wrap_uj.update({device: _wrap_range_uj(source, device) for device in devices})
            except Exception as e:
                _close(source)
                self._drop(source.name, e)
            else:
                taken.update(devices)
                self.active.append(
                    ActiveSource(
                        source.name, source.method, source.scope, source.driver, source.update_period_s, devices
                    )
                )
                self._sources[source.name] = source

    def keep(self, assigned: Iterable[ActiveSource]) -> None:
        """Keep this part of the active sources and close the rest, which other processes read."""
        by_name = {source.name: source for source in assigned}
        for source in self.active:
            if source.name not in by_name:
                _close(self._sources.pop(source.name))
                self.unavailable.append(
                    UnavailableSource(source.name, Status.OK, "read by another process of this run")
                )
        self.active = [by_name[source.name] for source in self.active if source.name in by_name]

    def expect_in(self, accumulator: Accumulator, idle_mw: Mapping[DeviceId, int] | None = None) -> None:
        """Add every device that is read to `accumulator`, with its idle power where that is known."""
        for source in self.active:
            for device in source.devices:
                accumulator.add_device(
                    device,
                    source=source.name,
                    method=source.method,
                    wrap_range_uj=self._wrap_uj[device],
                    idle_mw=None if idle_mw is None else idle_mw.get(device),
                    update_period_s=source.update_period_s,
                )

    def due_s(self, interval_s: float) -> float:
        """Return the time until a reading is due, in seconds.

        Args:
            interval_s: Time that is asked for. It is as long as the fastest source takes to renew its values if that
                is longer, and shorter where a counter might pass its end twice in it.
        """
        ranges = [self._wrap_uj[device] for source in self.active for device in source.devices]
        wraps_s = min((range_uj / 1e6 / MAX_WRAP_POWER_W for range_uj in ranges if range_uj), default=math.inf)
        return max(min(interval_s, wraps_s / 2), min((source.update_period_s for source in self.active), default=0.0))

    def read(self, source: ActiveSource) -> Mapping[DeviceId, Reading]:
        """Read the devices of one active source, without those whose reading is none; raises what the source raises."""
        readings: dict[DeviceId, Reading] = {}
        for device, reading in self._sources[source.name].read(source.devices).items():
            with contextlib.suppress(Exception):
                readings[device] = check_reading(reading)
        return readings

    def close(self) -> None:
        """Close the sources. May be called twice."""
        for source in self._sources.values():
            _close(source)
        self._sources = {}

    def _drop(self, name: str, error: Exception) -> None:
        """Note why a source is not used: a vendor's library may fail in any way, and the training must go on."""
        if isinstance(error, SourceUnavailable):
            status, reason = error.status, error.reason
        else:
            status, reason = Status.ERROR, f"{type(error).__name__}: {error}"
        self.unavailable.append(UnavailableSource(name, status, reason))


def _choose(
    source: EnergySource,
    devices: dict[DeviceId, DeviceInfo],
    held: Mapping[str, str],
    measured: dict[str, str],
    taken: Collection[DeviceId],
    select: Select | None,
) -> dict[DeviceId, DeviceInfo]:
    """Return the devices of `source` that this process is to read.

    Args:
        source: An open source.
        devices: Its devices.
        held: By kind, the source whose readings of other kinds include it.
        measured: By kind, the source that measures it; the kinds of `source` are added if it measures.
        taken: Devices that sources before this one read.
        select: As for `SourceSet.open`.

    Raises:
        SourceUnavailable: No device is left.
    """

    def narrow(keep: Collection[DeviceId], why: str) -> None:
        nonlocal devices
        devices = {device: info for device, info in devices.items() if device in keep}
        if not devices:
            raise SourceUnavailable(Status.OK, why)

    kinds = sorted({device.kind for device in devices})
    if source.method == "estimated":
        by = ", ".join(f"{kind} is measured by {measured[kind]}" for kind in kinds if kind in measured)
        narrow([d for d in devices if d.kind not in measured], f"not needed: {by}")
    else:
        # Also where this process leaves the reading to another one: it is measured all the same.
        measured.update({kind: measured.get(kind, source.name) for kind in kinds})
        by = ", ".join(f"{kind} is in the readings of {held[kind]}" for kind in kinds if kind in held)
        narrow([d for d in devices if d.kind not in held], f"it would count twice: {by}")
    if select is not None:
        narrow(select(source, devices), "read by another process, or not used by this run")
    narrow([d for d in devices if d not in taken], "another source reads the same devices")
    return devices


def _open(source: EnergySource) -> dict[DeviceId, DeviceInfo]:
    source.open()
    try:
        check_source(source)  # again: what it knows of its hardware only now
        devices = dict(source.devices())
        if not devices:
            raise SourceUnavailable(Status.UNAVAILABLE, "it has no devices")
        for device, info in devices.items():
            if not isinstance(device, DeviceId) or not isinstance(info, DeviceInfo):
                raise TypeError(f"devices must be {{DeviceId: DeviceInfo}}, got {{{device!r}: {info!r}}}")
            if any(type(text) is not str for text in (device.host, device.kind, device.uid)):  # a checkpoint holds them
                raise TypeError(f"host, kind and uid of a device must be str, got {device!r}")
            if not set(info.covers) <= set(KINDS):
                raise ValueError(f"{device}: covers must be kinds of {KINDS}, got {info.covers!r}")
    except BaseException:
        _close(source)
        raise
    return devices


def _wrap_range_uj(source: EnergySource, device: DeviceId) -> int | None:
    range_uj = source.wrap_range_uj(device)
    if range_uj is not None and not range_uj > 0:
        raise ValueError(f"{device}: wrap_range_uj must be > 0 or None, got {range_uj!r}")
    return None if range_uj is None else int(range_uj)


def _close(source: EnergySource) -> None:
    # Nothing depends on it any more, and an error here would hide the one that brought us here.
    with contextlib.suppress(Exception):
        source.close()
