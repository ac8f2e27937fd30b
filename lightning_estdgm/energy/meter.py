"""Sources, accumulator and a sampling thread put together; needs no Lightning."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from lightning_estdgm.energy import DeviceId, EnergySource, Method, Reading, SourceUnavailable, Status
from lightning_estdgm.energy.accumulator import Accumulator, Totals

__all__ = ["Absent", "Meter", "Opened"]

Select = Callable[[EnergySource, Mapping[DeviceId, str]], Collection[DeviceId]]


@dataclass(frozen=True)
class Opened:
    """A source in use."""

    name: str
    method: Method
    devices: dict[DeviceId, str]


@dataclass(frozen=True)
class Absent:
    """A source that is not used, and why."""

    name: str
    status: Status
    reason: str


class Meter:
    """Reads sources every `interval_s` from one daemon thread, and at once whenever `mark` or `read` is
    called.

    A device is read by the first source that offers it, and an estimate is dropped for a kind that is
    measured. In a forked child every method does nothing: the thread and the vendors' state stay with the
    parent.

    Args:
        sources: names with sources, or with the reason why there is none, as `resolve` gives them.
        interval_s: time between two readings of the thread; never shorter than a source renews its values.
    """

    def __init__(self, sources: Iterable[tuple[str, EnergySource | SourceUnavailable]], *, interval_s: float) -> None:
        self._candidates = list(sources)
        self._interval_s = interval_s
        self._accumulator = Accumulator(max_interval_s=max(5.0, 3 * interval_s))
        self._sources: list[EnergySource] = []
        self._periods: dict[DeviceId, float] = {}
        self._seen: dict[DeviceId, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid: int | None = None
        self._closed = False
        self.opened: list[Opened] = []
        self.absent: list[Absent] = []

    def start(self, label: str, stage: str, select: Select | None = None) -> None:
        """Open the sources, read once, start the thread. `select` narrows what is read of a source.

        Raises:
            RuntimeError: the meter was started before.
        """
        if self._pid is not None:
            raise RuntimeError("a Meter starts once; make a new one")
        self._pid = os.getpid()
        measured: dict[str, str] = {}
        # Estimates last, whatever the order they were named in: only then is it known what is measured.
        for name, source in sorted(self._candidates, key=lambda item: _method(item[1]) == "estimated"):
            try:
                if isinstance(source, SourceUnavailable):
                    raise source
                self._open(source, measured, select)
            except SourceUnavailable as e:
                self.absent.append(Absent(name, e.status, e.reason))
            except Exception as e:  # a vendor's library may fail in any way; the training must go on
                self.absent.append(Absent(name, Status.ERROR, f"{type(e).__name__}: {e}"))
        interval_s = max([self._interval_s, *self._periods.values()])
        self._accumulator.switch(time.monotonic_ns(), label, stage)
        with self._lock:
            self._read()
        if self._sources:
            self._thread = threading.Thread(target=self._run, args=(interval_s,), name="estdgm-energy", daemon=True)
            self._thread.start()

    def mark(self, label: str, stage: str) -> None:
        """Read now; from here on energy belongs to (label, stage)."""
        if not self._ours():
            return
        with self._lock:
            self._read()
            self._accumulator.switch(time.monotonic_ns(), label, stage)

    def read(self) -> None:
        """Read now."""
        if not self._ours():
            return
        with self._lock:
            self._read()

    def stop(self) -> None:
        """Stop and join the thread, read a last time, close the sources. May be called twice."""
        if not self._ours():
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        with self._lock:
            self._read()
            for source in self._sources:
                _close(source)
            self._sources = []
        self._closed = True

    def totals(self) -> Totals:
        """The sums so far."""
        with self._guard():
            return self._accumulator.totals()

    def watts(self) -> dict[DeviceId, float]:
        """Mean watts per device since the last call that reported it.

        A device is left out where less time than its update period was covered since.
        """
        with self._guard():
            now = self._accumulator.device_totals()
        result = {}
        for device, (uj, ns) in now.items():
            old_uj, old_ns = self._seen.get(device, (0, 0))
            if ns - old_ns > 1e9 * self._periods[device]:
                result[device] = (uj - old_uj) * 1000 / (ns - old_ns)
                self._seen[device] = (uj, ns)
        return result

    def _ours(self) -> bool:
        return self._pid == os.getpid() and not self._closed

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        # A fork may have copied the lock while the thread held it; nobody in the child would ever release it.
        return self._lock if self._ours() else contextlib.nullcontext()

    def _open(self, source: EnergySource, measured: dict[str, str], select: Select | None) -> None:
        source.open()
        try:
            devices = dict(source.devices())
            if not devices:
                raise SourceUnavailable(Status.UNAVAILABLE, "it has no devices")
            kinds = sorted({device.kind for device in devices})
            if source.method == "estimated":
                devices = {d: text for d, text in devices.items() if d.kind not in measured}
                if not devices:
                    by = ", ".join(f"{kind} is measured by {measured[kind]}" for kind in kinds)
                    raise SourceUnavailable(Status.OK, f"not needed: {by}")
            else:
                # Also where this process leaves the reading to another one: it is measured all the same.
                measured.update({kind: measured.get(kind, source.name) for kind in kinds})
            if select is not None:
                chosen = set(select(source, devices))
                devices = {d: text for d, text in devices.items() if d in chosen}
                if not devices:
                    raise SourceUnavailable(Status.OK, "read by another process, or not used by this run")
            devices = {d: text for d, text in devices.items() if d not in self._accumulator.devices}
            if not devices:
                raise SourceUnavailable(Status.OK, "another source reads the same devices")
            for device in devices:
                self._accumulator.add_device(
                    device,
                    source=source.name,
                    method=source.method,
                    wrap_range_uj=source.wrap_range_uj(device),
                )
                self._periods[device] = source.update_period_s
        except BaseException:
            _close(source)
            raise
        self._sources.append(source)
        self.opened.append(Opened(source.name, source.method, devices))

    def _read(self) -> None:
        readings: dict[DeviceId, Reading] = {}
        for source in self._sources:
            try:
                got = source.read()
            except Exception:
                continue  # its devices are missing from the readings, so they count as failed
            for device, reading in got.items():
                readings.setdefault(device, reading)
        self._accumulator.update(time.monotonic_ns(), readings)

    def _run(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self.read()


def _method(source: EnergySource | SourceUnavailable) -> str | None:
    return None if isinstance(source, SourceUnavailable) else source.method


def _close(source: EnergySource) -> None:
    # Nothing depends on it any more, and an error here would hide the one that brought us here.
    with contextlib.suppress(Exception):
        source.close()
