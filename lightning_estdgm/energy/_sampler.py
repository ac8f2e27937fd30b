"""A background thread that reads energy sources and adds up what they use."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping

from lightning_estdgm._checks import is_number
from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource
from lightning_estdgm.energy._reading import DeviceId, Reading, SourceUnavailable
from lightning_estdgm.energy._source_set import Select, SourceSet
from lightning_estdgm.energy._totals import Totals
from lightning_estdgm.energy.sources._protocol import EnergySource

PATIENCE_S = 30.0
"""Time for which a caller waits for a reading, in seconds."""


def check_seconds(name: str, value: float, expected: str = "seconds") -> float:
    """Return `value` as a float.

    Args:
        name: Name of the argument, for messages.
        value: Time in seconds.
        expected: Description of what is accepted, for messages.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive and finite.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number of {expected}, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be > 0 {expected}, got {value!r}")
    return float(value)


class Sampler:
    """Reads sources every `interval_s` from one daemon thread, and at once whenever `mark` or `read` is called.

    No source is read more often than it renews its values. Methods may be called from a signal handler that has
    interrupted one of them, as that of a job that is requeued, which saves a checkpoint: nothing is read then. In a
    forked child every method does nothing: the thread and the vendors' state stay with the parent. A source that never
    answers costs a warning: from then on no source is read, and every device counts as failing.

    Args:
        sources: Names with sources, or with the reason why there is none, as `resolve` gives them.
        interval_s: Time between two readings of the thread; see `SourceSet.due_s`.
    """

    def __init__(self, sources: Iterable[tuple[str, EnergySource | SourceUnavailable]], *, interval_s: float) -> None:
        self._sources = SourceSet(sources)
        self._interval_s = interval_s
        self._accumulator = self._new_accumulator()
        self._read_at_ns: dict[str, int] = {}
        self._idle_mw: dict[DeviceId, int] = {}
        self._lock = threading.RLock()
        self._is_reading = False
        self._asked = ""  # name of the source that is being read
        self._is_stuck = False  # whether the thread has waited too long for it
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid: int | None = None
        self._closed = False
        self._started = False

    @property
    def active(self) -> list[ActiveSource]:
        """Sources in use, with the devices that each reads; also after `stop`."""
        return self._sources.active

    @property
    def unavailable(self) -> list[UnavailableSource]:
        """Sources that are not used."""
        return self._sources.unavailable

    # Before the start

    def open(self, select: Select | None = None) -> None:
        """Open the sources and choose what each reads.

        Args:
            select: Narrows the devices that are read of a source; None keeps all.

        Raises:
            RuntimeError: The sampler was opened before.
        """
        if self._pid is not None:
            raise RuntimeError("a Sampler starts once; make a new one")
        self._pid = os.getpid()
        self._sources.open(select)

    def keep(self, assigned: Iterable[ActiveSource]) -> None:
        """Read this part of what was opened alone: other processes read the rest."""
        self._sources.keep(assigned)

    def measure_idle(self, seconds: float) -> None:
        """Measure the idle baseline over `seconds`, or the longest update period if that is longer."""
        seconds = max([seconds, *(source.update_period_s for source in self.active)])
        accumulator = self._new_accumulator()
        self._sources.expect_in(accumulator)
        begin_ns = time.monotonic_ns()
        end_ns = begin_ns + round(seconds * 1e9)
        accumulator.switch(begin_ns, "idle", "idle")
        self._read_into(accumulator, at_once=True)
        while (left_s := (end_ns - time.monotonic_ns()) / 1e9) > 0:
            time.sleep(min(left_s, self._sources.due_s(self._interval_s)))
            self._read_into(accumulator, at_once=time.monotonic_ns() >= end_ns)
        totals = accumulator.totals()
        energy_uj = totals.device_uj()
        self._idle_mw = {d: round(energy_uj[d] * 1_000_000 / ns) for d, ns in totals.device_ns.items()}

    @property
    def idle_watts(self) -> dict[DeviceId, float]:
        """Idle baseline by device, as far as it was measured."""
        return {device: mw / 1000 for device, mw in self._idle_mw.items()}

    def start(self, label: str, stage: str) -> None:
        """Read once and start the thread; opens the sources if `open` did not. No thread to be had costs a warning.

        Raises:
            RuntimeError: The sampler was started before.
        """
        if self._started:
            raise RuntimeError("a Sampler starts once; make a new one")
        if self._pid is None:
            self.open()
        self._started = True
        self._sources.expect_in(self._accumulator, self._idle_mw)
        self._accumulator.switch(time.monotonic_ns(), label, stage)
        self._read_now(at_once=True)
        if self._sources:
            thread = threading.Thread(target=self._run, name="estdgm-energy", daemon=True)
            try:
                thread.start()
            except RuntimeError as e:  # a container's limit on processes
                warnings.warn(
                    f"{e}: energy is read when it is logged or the phase changes, not every {self._interval_s:g} s. "
                    "Power that is read too rarely is a gap (energy/coverage_ratio); a higher limit on threads helps",
                    stacklevel=2,
                )
            else:
                self._thread = thread

    # While it runs

    def mark(self, label: str, stage: str) -> None:
        """Read now, and attribute energy from here on to (label, stage)."""
        if not self._is_ours():
            return
        with self._held():
            if not self._is_reading:
                self._read_now()
                self._accumulator.switch(time.monotonic_ns(), label, stage)

    def read(self) -> None:
        """Read now."""
        if self._is_ours():
            self._read_now()

    def stop(self) -> None:
        """Stop and join the thread, read a last time, close the sources. May be called twice."""
        if not self._is_ours():
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(0.0 if self._is_stuck else PATIENCE_S)
            if self._thread.is_alive() and not self._is_stuck:
                self._give_up()
        self._thread = None
        with self._held():
            if self._started:
                self._read_now(at_once=True)
            if not self._is_stuck:
                self._sources.close()
        self._closed = True

    def totals(self) -> Totals:
        """Return the sums so far."""
        with self._guard():
            return self._accumulator.totals()

    def failing(self) -> tuple[DeviceId, ...]:
        """Return the devices whose last reading failed."""
        with self._guard():
            return self._accumulator.failing

    # Inside

    def _is_ours(self) -> bool:
        return self._pid == os.getpid() and not self._closed

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        # A fork may have copied the lock while the thread held it; nobody in the child would ever release it.
        return self._held() if self._is_ours() else contextlib.nullcontext()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock; if the thread is stuck in a source and keeps it, give up reading and hold a new one."""
        lock = self._lock
        if not lock.acquire(timeout=PATIENCE_S):
            if not self._is_stuck:
                self._give_up()
            lock = self._lock
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _give_up(self) -> None:
        self._is_stuck, self._is_reading = True, False
        self._lock = threading.RLock()
        self._stop.set()
        warnings.warn(
            f"energy source {self._asked!r} has not answered for {PATIENCE_S:g} s: no energy is read from now on. What "
            "was read before stays, and the rest of the run counts as not covered (energy/coverage_ratio). A driver or "
            "a device that hangs is the usual cause",
            RuntimeWarning,
            stacklevel=2,
        )

    def _new_accumulator(self) -> Accumulator:
        return Accumulator(max_interval_s=max(5.0, 3 * self._interval_s))

    def _read_now(self, *, at_once: bool = False) -> None:
        with self._held():
            if self._is_reading:  # in this thread, which a signal has interrupted
                return
            self._is_reading = True
            try:
                self._read_into(self._accumulator, at_once)
            finally:
                self._is_reading = False

    def _read_into(self, accumulator: Accumulator, at_once: bool = False) -> None:
        readings: dict[DeviceId, Reading] = {}
        not_due: set[DeviceId] = set()
        was_stuck = self._is_stuck
        for source in [] if was_stuck else self.active:
            now_ns = time.monotonic_ns()
            if not at_once and now_ns - self._read_at_ns[source.name] < 1e9 * source.update_period_s:
                not_due.update(source.devices)  # the value may be the last one still, and would read as no energy
                continue
            self._read_at_ns[source.name] = now_ns
            self._asked = source.name
            try:
                found = self._ask(source)
            except Exception:
                continue  # its devices are missing from the readings, so they count as failed
            if self._is_stuck != was_stuck:
                return  # it came too late, or not at all
            for device, reading in found.items():
                readings.setdefault(device, reading)
        accumulator.update(time.monotonic_ns(), readings, not_due)

    def _ask(self, source: ActiveSource) -> Mapping[DeviceId, Reading]:
        """Read a source; outside the thread, in one of its own, as its driver may never return."""
        if threading.current_thread() is self._thread:
            return self._sources.read(source)
        answers: list[Mapping[DeviceId, Reading]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answers.append(self._sources.read(source))

        asking = threading.Thread(target=ask, name="estdgm-energy-reading", daemon=True)
        try:
            asking.start()
        except RuntimeError:  # a container's limit on processes
            return self._sources.read(source)
        asking.join(PATIENCE_S)
        if asking.is_alive():
            self._give_up()
        return answers[0] if answers else {}

    def _run(self) -> None:
        interval_s = self._sources.due_s(self._interval_s)
        while not self._stop.wait(min(interval_s, threading.TIMEOUT_MAX)):
            self.read()
