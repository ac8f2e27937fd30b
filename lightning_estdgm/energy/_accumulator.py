"""Conversion of readings to joules: differences, gaps, and attribution to phases and stages.

Pure logic: no thread, no clock, no device. Energy is kept in integer microjoules, so windows add up to the
total exactly, however they were cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_estdgm.energy._reading import DeviceId, Method, Reading, Status
from lightning_estdgm.energy._totals import Cell, Totals

MAX_WRAP_POWER_W = 1000
"""No CPU package or memory domain draws more: a wrap that implies more is a reset of the counter."""


@dataclass
class _Track:
    """State of one device between two readings."""

    source: str
    method: Method
    wrap_uj: int | None
    idle_mw: int | None = None
    longest_ns: int = 0  # over which power is integrated
    base: Reading | None = None  # the last good reading of the open segment
    in_gap: bool = False
    covered_ns: int = 0


class Accumulator:
    """Sums up the differences between readings, by the window (label, stage) in which they fell.

    A difference that spans several windows (a reading failed at the boundary, or came a little after it) is
    split between them by time, in whole microjoules, so nothing is lost to rounding.

    - Counter: ``new - old``; if ``new < old``, ``new + range - old`` where the range is known and the result
      is plausible, else the counter was reset: a new segment and a counted gap.
    - Power: the trapezoid ``(p0 + p1) / 2 * dt``; no bridge over a failed reading or over more than
      `max_interval_s`.
    - A failed reading is a gap, never 0. After a passing error a counter's next good reading also tells what
      the gap used; after a lost device it does not.

    Args:
        max_interval_s: longest interval between two readings of power over which power is integrated, in seconds;
            three update periods of the device's source, if that is longer.

    Raises:
        ValueError: `max_interval_s` is not positive.
    """

    def __init__(self, *, max_interval_s: float = 5.0) -> None:
        if not max_interval_s > 0:
            raise ValueError(f"max_interval_s must be > 0, got {max_interval_s!r}")
        self._max_interval_ns = round(max_interval_s * 1e9)
        self._tracks: dict[DeviceId, _Track] = {}
        self._windows: list[tuple[int, str, str]] = []  # start, label, stage; the last one is open
        self._totals = Totals()
        self._now_ns = 0

    def add_device(
        self,
        device: DeviceId,
        *,
        source: str,
        method: Method,
        wrap_range_uj: int | None = None,
        idle_mw: int | None = None,
        update_period_s: float = 0.0,
    ) -> None:
        """Expect readings of `device` from now on.

        Args:
            device: Device to add.
            source: Name of the source that reads it.
            method: Method of that source.
            wrap_range_uj: Range of the counter in microjoules; None takes a counter that goes back for a reset.
            idle_mw: Idle power in milliwatts, where it was measured.
            update_period_s: Time in which the source renews its values.

        Raises:
            ValueError: The device was added before, so it would be counted twice, or the wrap range is not positive.
        """
        if device in self._tracks:
            raise ValueError(f"{device} is already read by source {self._tracks[device].source!r}")
        if wrap_range_uj is not None and wrap_range_uj <= 0:
            raise ValueError(f"wrap_range_uj must be > 0 or None, got {wrap_range_uj!r}")
        self._tracks[device] = _Track(
            source, method, wrap_range_uj, idle_mw, max(self._max_interval_ns, round(3e9 * update_period_s))
        )

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Devices that were added."""
        return tuple(self._tracks)

    def switch(self, now_ns: int, label: str, stage: str) -> None:
        """Attribute energy from `now_ns` on to (label, stage). The first call starts the clock."""
        self._advance(now_ns)
        if not self._windows or self._windows[-1][1:] != (label, stage):
            self._windows.append((max(now_ns, self._now_ns), label, stage))
            self._totals.window_ns.setdefault((label, stage), 0)

    @property
    def failing(self) -> tuple[DeviceId, ...]:
        """Devices whose last reading failed."""
        return tuple(device for device, track in self._tracks.items() if track.in_gap)

    def update(
        self, now_ns: int, readings: Mapping[DeviceId, Reading], not_due: Collection[DeviceId] = frozenset()
    ) -> None:
        """Add one round of readings; a device that is neither among them nor in `not_due` counts as failed.

        Raises:
            RuntimeError: No window was opened with `switch`.
        """
        if not self._windows:
            raise RuntimeError("call switch(now_ns, label, stage) before the first update")
        self._advance(now_ns)
        for device, track in self._tracks.items():
            if device in not_due:
                continue
            reading = readings.get(device) or Reading(now_ns, status=Status.ERROR)
            self._take(device, track, reading)
        self._forget_old_windows()

    def totals(self) -> Totals:
        """Return a copy of the sums so far."""
        with_idle = [(track.idle_mw, track.covered_ns) for track in self._tracks.values() if track.idle_mw is not None]
        idle = Totals(
            idle_uj=sum(mw * ns // 1_000_000 for mw, ns in with_idle),  # mW * ns = pJ
            idle_ns=sum(ns for _, ns in with_idle),
            device_ns={device: track.covered_ns for device, track in self._tracks.items() if track.covered_ns},
        )
        return self._totals.add(idle)

    def _advance(self, now_ns: int) -> None:
        if self._windows and now_ns > self._now_ns:
            passed = now_ns - self._now_ns
            self._totals.window_ns[self._windows[-1][1:]] += passed
            self._totals.expected_ns += passed * len(self._tracks)
        self._now_ns = max(self._now_ns, now_ns)

    def _take(self, device: DeviceId, track: _Track, new: Reading) -> None:
        old = track.base
        if new.status is not Status.OK or (new.energy_uj is None and new.power_mw is None):
            self._gap(track)
            # A counter runs on while it cannot be read; power that nobody saw is unknown.
            if new.status is not Status.ERROR or (old is not None and old.energy_uj is None):
                track.base = None
            return
        if old is not None and new.monotonic_ns <= old.monotonic_ns:
            return  # two readings at one instant: the later one tells nothing more
        delta = None if old is None else self._delta_uj(track, old, new)
        if old is not None and delta is None:
            self._gap(track)
        if delta is None:
            self._totals.segments += 1
        else:
            assert old is not None
            self._book(device, track, old.monotonic_ns, new.monotonic_ns, delta)
        track.base = new
        track.in_gap = False

    def _gap(self, track: _Track) -> None:
        if not track.in_gap:
            self._totals.gaps += 1
        track.in_gap = True

    def _delta_uj(self, track: _Track, old: Reading, new: Reading) -> int | None:
        span_ns = new.monotonic_ns - old.monotonic_ns
        if old.energy_uj is not None and new.energy_uj is not None:
            delta = new.energy_uj - old.energy_uj
            if track.wrap_uj is None:
                return delta if delta >= 0 else None
            most_uj = MAX_WRAP_POWER_W * span_ns // 1000
            if most_uj >= track.wrap_uj:
                return None  # so long that it may have wrapped more than once
            if delta < 0:
                delta += track.wrap_uj
                return delta if 0 <= delta <= most_uj else None
            return delta
        if old.energy_uj is None and new.energy_uj is None:
            assert old.power_mw is not None
            assert new.power_mw is not None
            if span_ns > track.longest_ns:
                return None
            return (old.power_mw + new.power_mw) * span_ns // 2_000_000  # mW * ns = pJ
        return None  # a device that changed from counter to power: the two do not continue each other

    def _book(self, device: DeviceId, track: _Track, start_ns: int, end_ns: int, delta_uj: int) -> None:
        """Split a difference over the windows it spans, by time; cumulative rounding keeps the sum exact."""
        done_uj = 0
        for i, (begin, label, stage) in enumerate(self._windows):
            last = i + 1 == len(self._windows)
            stop = end_ns if last else min(end_ns, self._windows[i + 1][0])
            if not last and stop <= max(begin, start_ns):
                continue  # empty, or over before this stretch began
            if i and begin >= end_ns:
                break
            # A reading may lie before the first window or after the newest switch: the outer windows reach
            # out.
            upto_uj = delta_uj * (stop - start_ns) // (end_ns - start_ns)
            cell = Cell(track.source, track.method, device, label, stage)
            self._totals.energy_uj[cell] = self._totals.energy_uj.get(cell, 0) + upto_uj - done_uj
            done_uj = upto_uj
        track.covered_ns += end_ns - start_ns
        self._totals.covered_ns += end_ns - start_ns

    def _forget_old_windows(self) -> None:
        needed = min((t.base.monotonic_ns for t in self._tracks.values() if t.base), default=self._now_ns)
        keep = 0
        while keep + 1 < len(self._windows) and self._windows[keep + 1][0] <= needed:
            keep += 1
        del self._windows[:keep]
