"""From readings to joules: differences, gaps, attribution to phases, totals that survive a restart.

Pure logic: no thread, no clock, no device. Energy is kept in integer microjoules, so windows add up to the
total exactly, in whatever way they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_estdgm.energy import DeviceId, Method, Reading, Status

__all__ = ["Accumulator", "Cell", "Totals"]

MAX_WRAP_POWER_W = 1000
"""No CPU package or memory domain draws more: a wrap that implies more is a reset of the counter."""

_VERSION = 1


@dataclass(frozen=True, order=True)
class Cell:
    """What one entry of the ledger belongs to."""

    source: str
    method: Method
    device: DeviceId
    label: str
    stage: str


@dataclass
class Totals:
    """Sums that may be added up over restarts and over processes.

    Attributes:
        energy_uj: microjoules per cell.
        window_ns: wall time per (label, stage).
        covered_ns: device time between two readings whose difference is known.
        expected_ns: device time there was: wall time times devices.
        gaps: stretches in which a device could not be read, plus counter resets.
        segments: runs of readings without a break, over all devices.
    """

    energy_uj: dict[Cell, int] = field(default_factory=dict)
    window_ns: dict[tuple[str, str], int] = field(default_factory=dict)
    covered_ns: int = 0
    expected_ns: int = 0
    gaps: int = 0
    segments: int = 0

    def add(self, other: Totals, *, wall: bool = True) -> Totals:
        """Return the sum. With `wall=False` the other's wall time ran beside this one's and is left out."""
        energy, windows = dict(self.energy_uj), dict(self.window_ns)
        for cell, uj in other.energy_uj.items():
            energy[cell] = energy.get(cell, 0) + uj
        if wall:
            for key, ns in other.window_ns.items():
                windows[key] = windows.get(key, 0) + ns
        return Totals(
            energy,
            windows,
            self.covered_ns + other.covered_ns,
            self.expected_ns + other.expected_ns,
            self.gaps + other.gaps,
            self.segments + other.segments,
        )

    def joules(
        self,
        *,
        kind: str | None = None,
        label: str | None = None,
        stage: str | None = None,
        estimated: bool | None = None,
    ) -> float | None:
        """Joules of the cells that match; None where nothing was ever read (which is not 0 J)."""
        cells = [
            uj
            for cell, uj in self.energy_uj.items()
            if kind in (None, cell.device.kind)
            and label in (None, cell.label)
            and stage in (None, cell.stage)
            and estimated in (None, cell.method == "estimated")
        ]
        return sum(cells) / 1e6 if cells else None

    @property
    def seconds(self) -> float:
        """Wall time of all windows."""
        return sum(self.window_ns.values()) / 1e9

    @property
    def coverage_ratio(self) -> float:
        """Share of the device time that readings cover, in [0, 1]; 0 without devices."""
        return min(1.0, self.covered_ns / self.expected_ns) if self.expected_ns else 0.0

    def labels(self) -> list[str]:
        """The labels in the order in which they were first entered."""
        return list(dict.fromkeys(label for label, _ in self.window_ns))

    def state_dict(self) -> dict[str, Any]:
        """Plain types only: loads with `torch.load(weights_only=True)`."""
        return {
            "version": _VERSION,
            "energy_uj": [
                [c.source, c.method, c.device.host, c.device.kind, c.device.uid, c.label, c.stage, uj]
                for c, uj in self.energy_uj.items()
            ],
            "window_ns": [[label, stage, ns] for (label, stage), ns in self.window_ns.items()],
            "covered_ns": self.covered_ns,
            "expected_ns": self.expected_ns,
            "gaps": self.gaps,
            "segments": self.segments,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Totals:
        """Rebuild what `state_dict` gave.

        Raises:
            ValueError: the state is of another version.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"energy totals of version {_VERSION} expected, got {state.get('version')!r}")
        energy = {
            Cell(source, method, DeviceId(host, kind, uid), label, stage): int(uj)
            for source, method, host, kind, uid, label, stage, uj in state["energy_uj"]
        }
        windows = {(label, stage): int(ns) for label, stage, ns in state["window_ns"]}
        counts = (int(state[k]) for k in ("covered_ns", "expected_ns", "gaps", "segments"))
        return cls(energy, windows, *counts)


@dataclass
class _Track:
    """The state of one device between two readings."""

    source: str
    method: Method
    wrap_uj: int | None
    base: Reading | None = None  # the last good reading of the open segment
    in_gap: bool = False
    covered_ns: int = 0
    energy_uj: int = 0


class Accumulator:
    """Adds up differences of readings and attributes them to the window (label, stage) in which they fell.

    A difference that spans several windows (a reading failed at the boundary, or came a little after it) is
    split between them by time, in whole microjoules, so nothing is lost to rounding.

    - Counter: ``new - old``; if ``new < old``, ``new + range - old`` where the range is known and the result
      is plausible, else the counter was reset: a new segment and a counted gap.
    - Power: the trapezoid ``(p0 + p1) / 2 * dt``; no bridge over a failed reading or over more than
      `max_interval_s`.
    - A failed reading is a gap, never 0. After a passing error a counter's next good reading also tells what
      the gap used; after a lost device it does not.

    Args:
        max_interval_s: longest stretch that is bridged between two readings of power, in seconds.

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

    def add_device(self, device: DeviceId, *, source: str, method: Method, wrap_range_uj: int | None = None) -> None:
        """Expect readings of `device`.

        Raises:
            ValueError: the device is known already: it would be counted twice. Or the wrap range is not
                positive.
        """
        if device in self._tracks:
            raise ValueError(f"{device} is already read by source {self._tracks[device].source!r}")
        if wrap_range_uj is not None and wrap_range_uj <= 0:
            raise ValueError(f"wrap_range_uj must be > 0 or None, got {wrap_range_uj!r}")
        self._tracks[device] = _Track(source, method, wrap_range_uj)

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """The devices that are expected."""
        return tuple(self._tracks)

    def switch(self, now_ns: int, label: str, stage: str) -> None:
        """Energy from `now_ns` on belongs to (label, stage). The first call starts the clock."""
        self._advance(now_ns)
        if not self._windows or self._windows[-1][1:] != (label, stage):
            self._windows.append((max(now_ns, self._now_ns), label, stage))
            self._totals.window_ns.setdefault((label, stage), 0)

    def update(self, now_ns: int, readings: Mapping[DeviceId, Reading]) -> None:
        """Take one round of readings; an expected device that is not among them counts as failed.

        Raises:
            RuntimeError: no window was opened with `switch`.
        """
        if not self._windows:
            raise RuntimeError("call switch(now_ns, label, stage) before the first update")
        self._advance(now_ns)
        for device, track in self._tracks.items():
            reading = readings.get(device) or Reading(now_ns, status=Status.ERROR)
            self._take(device, track, reading)
        self._forget_old_windows()

    def totals(self) -> Totals:
        """A copy of the sums so far."""
        return Totals().add(self._totals)

    def device_totals(self) -> dict[DeviceId, tuple[int, int]]:
        """Per device: microjoules, and the nanoseconds that they cover."""
        return {device: (track.energy_uj, track.covered_ns) for device, track in self._tracks.items()}

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
            if span_ns > self._max_interval_ns:
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
        track.energy_uj += delta_uj
        track.covered_ns += end_ns - start_ns
        self._totals.covered_ns += end_ns - start_ns

    def _forget_old_windows(self) -> None:
        needed = min((t.base.monotonic_ns for t in self._tracks.values() if t.base), default=self._now_ns)
        keep = 0
        while keep + 1 < len(self._windows) and self._windows[keep + 1][0] <= needed:
            keep += 1
        del self._windows[:keep]
