"""Sources, accumulator and a sampling thread put together; needs no Lightning."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from lightning_estdgm.energy.accumulator import Accumulator, Totals
from lightning_estdgm.energy.device_assignment import Opened
from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy.sources.protocol import EnergySource

__all__ = ["Absent", "Meter", "Opened", "Watts", "check_interval"]

Select = Callable[[EnergySource, Mapping[DeviceId, DeviceInfo]], Collection[DeviceId]]


@dataclass(frozen=True)
class Absent:
    """A source that is not used, and why."""

    name: str
    status: Status
    reason: str


def check_interval(interval_s: float) -> float:
    """Return `interval_s` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    if isinstance(interval_s, bool) or not isinstance(interval_s, (int, float)):
        raise TypeError(f"interval_s must be a number of seconds, got {interval_s!r}")
    if not (math.isfinite(interval_s) and interval_s > 0):
        raise ValueError(f"interval_s must be > 0 seconds, got {interval_s!r}")
    return float(interval_s)


class Watts:
    """Mean watts per device between two calls of `since`.

    Args:
        periods_s: how often each device renews its value; over a shorter time it has no mean.
    """

    def __init__(self, periods_s: Mapping[DeviceId, float]) -> None:
        self._periods_s = periods_s
        self._seen: dict[DeviceId, tuple[int, int]] = {}

    def since(self, totals: Totals) -> dict[DeviceId, float]:
        """Watts since the last call that reported the device; without the devices that were not read since."""
        result = {}
        energy_uj = totals.device_uj()
        for device, ns in totals.device_ns.items():
            uj = energy_uj.get(device, 0)
            old_uj, old_ns = self._seen.get(device, (0, 0))
            if ns - old_ns > 1e9 * self._periods_s[device]:
                result[device] = (uj - old_uj) * 1000 / (ns - old_ns)
                self._seen[device] = (uj, ns)
        return result


class Meter:
    """Reads sources every `interval_s` from one daemon thread, and at once whenever `mark` or `read` is
    called, but no source more often than it renews its values.

    A device is read by the first source that offers it. An estimate is dropped for a kind that is measured, and
    every source for a kind that another reading holds already (a module counter). In a forked child every method
    does nothing: the thread and the vendors' state stay with the parent.

    Args:
        sources: names with sources, or with the reason why there is none, as `resolve` gives them.
        interval_s: time between two readings of the thread; never shorter than a source renews its values.
    """

    def __init__(self, sources: Iterable[tuple[str, EnergySource | SourceUnavailable]], *, interval_s: float) -> None:
        self._candidates = list(sources)
        self._interval_s = interval_s
        self._accumulator = self._new_accumulator()
        self._sources: dict[str, EnergySource] = {}
        self._read_at_ns: dict[str, int] = {}
        self._wrap_uj: dict[DeviceId, int | None] = {}
        self._idle_mw: dict[DeviceId, int] = {}
        self._watts = Watts({})
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid: int | None = None
        self._closed = False
        self._started = False
        self.opened: list[Opened] = []
        self.absent: list[Absent] = []

    # Before the start

    def open(self, select: Select | None = None) -> None:
        """Open the sources and settle what each reads. `select` narrows what is read of a source.

        Raises:
            RuntimeError: the meter was opened before.
        """
        if self._pid is not None:
            raise RuntimeError("a Meter starts once; make a new one")
        self._pid = os.getpid()
        found: list[tuple[EnergySource, dict[DeviceId, DeviceInfo]]] = []
        for name, source in self._candidates:
            try:
                if isinstance(source, SourceUnavailable):
                    raise source
                found.append((source, _open(source)))
            except SourceUnavailable as e:
                self.absent.append(Absent(name, e.status, e.reason))
            except Exception as e:  # a vendor's library may fail in any way; the training must go on
                self.absent.append(Absent(name, Status.ERROR, f"{type(e).__name__}: {e}"))
        # Estimates last, whatever the order they were named in: only then is it known what is measured.
        found.sort(key=lambda item: item[0].method == "estimated")
        held: dict[str, str] = {
            kind: source.name for source, devices in found for info in devices.values() for kind in info.covers
        }
        measured = dict(held)
        taken: set[DeviceId] = set()
        for source, devices in found:
            try:
                devices = self._choose(source, devices, held, measured, taken, select)
                self._wrap_uj.update({device: _wrap_range_uj(source, device) for device in devices})
            except SourceUnavailable as e:
                _close(source)
                self.absent.append(Absent(source.name, e.status, e.reason))
            except Exception as e:
                _close(source)
                self.absent.append(Absent(source.name, Status.ERROR, f"{type(e).__name__}: {e}"))
            else:
                taken.update(devices)
                self.opened.append(
                    Opened(source.name, source.method, source.scope, source.driver, source.update_period_s, devices)
                )
                self._sources[source.name] = source

    def keep(self, claimed: Iterable[Opened]) -> None:
        """Read only this part of what was opened: other processes read the rest."""
        by_name = {source.name: source for source in claimed}
        for source in self.opened:
            if source.name not in by_name:
                _close(self._sources.pop(source.name))
                self.absent.append(Absent(source.name, Status.OK, "read by another process of this run"))
        self.opened = [by_name[source.name] for source in self.opened if source.name in by_name]

    def measure_idle(self, seconds: float) -> None:
        """Read for so long, at least for the longest update period; totals will hold it as the idle baseline."""
        seconds = max([seconds, *(source.update_period_s for source in self.opened)])
        accumulator = self._new_accumulator()
        self._expect_devices(accumulator)
        begin_ns = time.monotonic_ns()
        end_ns = begin_ns + round(seconds * 1e9)
        accumulator.switch(begin_ns, "idle", "idle")
        while True:
            self._read_into(accumulator, at_once=True)
            left_s = (end_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                break
            time.sleep(min(left_s, self._thread_interval_s()))
        totals = accumulator.totals()
        energy_uj = totals.device_uj()
        self._idle_mw = {d: round(energy_uj[d] * 1_000_000 / ns) for d, ns in totals.device_ns.items()}

    @property
    def idle_watts(self) -> dict[DeviceId, float]:
        """The idle baseline by device, as far as it was measured."""
        return {device: mw / 1000 for device, mw in self._idle_mw.items()}

    def start(self, label: str, stage: str) -> None:
        """Read once and start the thread; opens the sources if `open` did not.

        Raises:
            RuntimeError: the meter was started before.
        """
        if self._started:
            raise RuntimeError("a Meter starts once; make a new one")
        if self._pid is None:
            self.open()
        self._started = True
        self._expect_devices(self._accumulator)
        self._watts = Watts({device: source.update_period_s for source in self.opened for device in source.devices})
        self._accumulator.switch(time.monotonic_ns(), label, stage)
        with self._lock:
            self._read_into(self._accumulator, at_once=True)
        if self._sources:
            self._thread = threading.Thread(target=self._run, name="estdgm-energy", daemon=True)
            self._thread.start()

    # While it runs

    def mark(self, label: str, stage: str) -> None:
        """Read now; from here on energy belongs to (label, stage)."""
        if not self._ours():
            return
        with self._lock:
            self._read_into(self._accumulator)
            self._accumulator.switch(time.monotonic_ns(), label, stage)

    def read(self) -> None:
        """Read now."""
        if not self._ours():
            return
        with self._lock:
            self._read_into(self._accumulator)

    def stop(self) -> None:
        """Stop and join the thread, read a last time, close the sources. May be called twice."""
        if not self._ours():
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        with self._lock:
            if self._started:
                self._read_into(self._accumulator, at_once=True)
            for source in self._sources.values():
                _close(source)
            self._sources = {}
        self._closed = True

    def totals(self) -> Totals:
        """The sums so far."""
        with self._guard():
            return self._accumulator.totals()

    def watts(self) -> dict[DeviceId, float]:
        """Mean watts per device since the last call that reported it.

        A device is left out where less time than its update period was covered since.
        """
        return self._watts.since(self.totals())

    def failing(self) -> tuple[DeviceId, ...]:
        """The devices whose last reading failed."""
        with self._guard():
            return self._accumulator.failing

    # Inside

    def _ours(self) -> bool:
        return self._pid == os.getpid() and not self._closed

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        # A fork may have copied the lock while the thread held it; nobody in the child would ever release it.
        return self._lock if self._ours() else contextlib.nullcontext()

    def _new_accumulator(self) -> Accumulator:
        return Accumulator(max_interval_s=max(5.0, 3 * self._interval_s))

    def _expect_devices(self, accumulator: Accumulator) -> None:
        for opened in self.opened:
            for device in opened.devices:
                accumulator.add_device(
                    device,
                    source=opened.name,
                    method=opened.method,
                    wrap_range_uj=self._wrap_uj[device],
                    idle_mw=self._idle_mw.get(device),
                )

    @staticmethod
    def _choose(
        source: EnergySource,
        devices: dict[DeviceId, DeviceInfo],
        held: Mapping[str, str],
        measured: dict[str, str],
        taken: Collection[DeviceId],
        select: Select | None,
    ) -> dict[DeviceId, DeviceInfo]:
        """The devices of `source` that this process is to read; raises `SourceUnavailable` for none."""

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

    def _read_into(self, accumulator: Accumulator, at_once: bool = False) -> None:
        readings: dict[DeviceId, Reading] = {}
        not_due: set[DeviceId] = set()
        for opened in self.opened:
            now_ns = time.monotonic_ns()
            if not at_once and now_ns - self._read_at_ns[opened.name] < 1e9 * opened.update_period_s:
                not_due.update(opened.devices)  # the value may be the last one still, and would read as no energy
                continue
            self._read_at_ns[opened.name] = now_ns
            try:
                got = self._sources[opened.name].read(opened.devices)
            except Exception:
                continue  # its devices are missing from the readings, so they count as failed
            for device, reading in got.items():
                readings.setdefault(device, reading)
        accumulator.update(time.monotonic_ns(), readings, not_due)

    def _thread_interval_s(self) -> float:
        return max([self._interval_s, *(source.update_period_s for source in self.opened)])

    def _run(self) -> None:
        interval_s = self._thread_interval_s()
        while not self._stop.wait(interval_s):
            self.read()


def _open(source: EnergySource) -> dict[DeviceId, DeviceInfo]:
    source.open()
    try:
        devices = dict(source.devices())
        if not devices:
            raise SourceUnavailable(Status.UNAVAILABLE, "it has no devices")
    except BaseException:
        _close(source)
        raise
    return devices


def _wrap_range_uj(source: EnergySource, device: DeviceId) -> int | None:
    range_uj = source.wrap_range_uj(device)
    if range_uj is not None and not range_uj > 0:
        raise ValueError(f"{device}: wrap_range_uj must be > 0 or None, got {range_uj!r}")
    return range_uj


def _close(source: EnergySource) -> None:
    # Nothing depends on it any more, and an error here would hide the one that brought us here.
    with contextlib.suppress(Exception):
        source.close()
