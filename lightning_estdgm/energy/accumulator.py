"""From readings to joules: differences, gaps, attribution to phases, totals that survive a restart.

Pure logic: no thread, no clock, no device. Energy is kept in integer microjoules, so windows add up to the
total exactly, in whatever way they were cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning_estdgm.energy.reading import DeviceId, Method, Reading, Status

__all__ = ["Accumulator", "Cell", "Totals"]

_Key = TypeVar("_Key")

MAX_WRAP_POWER_W = 1000
"""No CPU package or memory domain draws more: a wrap that implies more is a reset of the counter."""

_VERSION = 2
_READABLE = (1, 2)  # version 1 knew no steps, counts, idle baseline, nor times by device


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
        device_ns: the covered time by device.
        idle_uj: what the devices would have used idle in the covered time, as far as a baseline was measured.
        idle_ns: the covered device time for which there is a baseline.
        steps: optimizer steps.
        counts: what else was counted, by unit ("sample", "token"); None where it is not known.
    """

    energy_uj: dict[Cell, int] = field(default_factory=dict)
    window_ns: dict[tuple[str, str], int] = field(default_factory=dict)
    covered_ns: int = 0
    expected_ns: int = 0
    gaps: int = 0
    segments: int = 0
    device_ns: dict[DeviceId, int] = field(default_factory=dict)
    idle_uj: int = 0
    idle_ns: int = 0
    steps: int = 0
    counts: dict[str, int | None] = field(default_factory=dict)

    def add(self, other: Totals, *, beside: bool = False) -> Totals:
        """Return the sum. With `beside` the other ran at the same time: its wall time and steps are left out."""
        return Totals(
            energy_uj=_sum(self.energy_uj, other.energy_uj),
            window_ns=dict(self.window_ns) if beside else _sum(self.window_ns, other.window_ns),
            covered_ns=self.covered_ns + other.covered_ns,
            expected_ns=self.expected_ns + other.expected_ns,
            gaps=self.gaps + other.gaps,
            segments=self.segments + other.segments,
            device_ns=_sum(self.device_ns, other.device_ns),
            idle_uj=self.idle_uj + other.idle_uj,
            idle_ns=self.idle_ns + other.idle_ns,
            steps=self.steps + (0 if beside else other.steps),
            counts={
                unit: _known_sum(self._count(unit), other._count(unit))
                for unit in dict.fromkeys([*self.counts, *other.counts])
            },
        )

    def _count(self, unit: str) -> int | None:
        """Nobody counted the unit: unknown, unless there was nothing to count yet."""
        return self.counts.get(unit, None if self.steps else 0)

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
    def net_joules(self) -> float | None:
        """Joules above the idle baseline; None unless all that was read has one. It may be below 0."""
        if not self.idle_ns or self.idle_ns != self.covered_ns:
            return None
        return (sum(self.energy_uj.values()) - self.idle_uj) / 1e6

    def device_uj(self) -> dict[DeviceId, int]:
        """Microjoules by device."""
        sums: dict[DeviceId, int] = {}
        for cell, uj in self.energy_uj.items():
            sums[cell.device] = sums.get(cell.device, 0) + uj
        return sums

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
            "device_ns": [[d.host, d.kind, d.uid, ns] for d, ns in self.device_ns.items()],
            "idle_uj": self.idle_uj,
            "idle_ns": self.idle_ns,
            "steps": self.steps,
            "counts": dict(self.counts),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Totals:
        """Rebuild what `state_dict` gave, now or in an older release.

        Raises:
            ValueError: the state is of an unknown version.
        """
        if state.get("version") not in _READABLE:
            known = " or ".join(map(str, _READABLE))
            raise ValueError(f"energy totals of version {known} expected, got {state.get('version')!r}")
        energy = {
            Cell(source, method, DeviceId(host, kind, uid), label, stage): int(uj)
            for source, method, host, kind, uid, label, stage, uj in state["energy_uj"]
        }
        windows = {(label, stage): int(ns) for label, stage, ns in state["window_ns"]}
        return cls(
            energy,
            windows,
            covered_ns=int(state["covered_ns"]),
            expected_ns=int(state["expected_ns"]),
            gaps=int(state["gaps"]),
            segments=int(state["segments"]),
            device_ns={DeviceId(host, kind, uid): int(ns) for host, kind, uid, ns in state.get("device_ns", ())},
            idle_uj=int(state.get("idle_uj", 0)),
            idle_ns=int(state.get("idle_ns", 0)),
            steps=int(state.get("steps", 0)),
            counts=dict(state.get("counts", {})),
        )


def _sum(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in dict.fromkeys([*a, *b])}


def _known_sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


@dataclass
class _Track:
    """The state of one device between two readings."""

    source: str
    method: Method
    wrap_uj: int | None
    idle_mw: int | None = None
    base: Reading | None = None  # the last good reading of the open segment
    in_gap: bool = False
    covered_ns: int = 0


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

    def add_device(
        self,
        device: DeviceId,
        *,
        source: str,
        method: Method,
        wrap_range_uj: int | None = None,
        idle_mw: int | None = None,
    ) -> None:
        """Expect readings of `device`; `idle_mw` is what it draws idle, where that was measured.

        Raises:
            ValueError: the device is known already: it would be counted twice. Or the wrap range is not
                positive.
        """
        if device in self._tracks:
            raise ValueError(f"{device} is already read by source {self._tracks[device].source!r}")
        if wrap_range_uj is not None and wrap_range_uj <= 0:
            raise ValueError(f"wrap_range_uj must be > 0 or None, got {wrap_range_uj!r}")
        self._tracks[device] = _Track(source, method, wrap_range_uj, idle_mw)

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

    @property
    def failing(self) -> tuple[DeviceId, ...]:
        """The devices whose last reading failed."""
        return tuple(device for device, track in self._tracks.items() if track.in_gap)

    def update(
        self, now_ns: int, readings: Mapping[DeviceId, Reading], not_due: Collection[DeviceId] = frozenset()
    ) -> None:
        """Take one round of readings; an expected device that is neither among them nor `not_due` failed.

        Raises:
            RuntimeError: no window was opened with `switch`.
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
        """A copy of the sums so far."""
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
        track.covered_ns += end_ns - start_ns
        self._totals.covered_ns += end_ns - start_ns

    def _forget_old_windows(self) -> None:
        needed = min((t.base.monotonic_ns for t in self._tracks.values() if t.base), default=self._now_ns)
        keep = 0
        while keep + 1 < len(self._windows) and self._windows[keep + 1][0] <= needed:
            keep += 1
        del self._windows[:keep]
