"""Times of a whole run of a schedule, from steps that were timed: pure functions."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_estdgm.method._schedules import Schedule
from lightning_estdgm.tools.bench.train._train_config import SETTLE_STEPS

DENSE = "dense"
"""Phase of a step without masks."""


@dataclass(frozen=True)
class Step:
    """One timed training step, from the start of its batch to the start of the next.

    Attributes:
        phase: phase of the schedule; `DENSE` without masks.
        density: active share of the masked weights.
        observed: whether it lay in an observation window.
        updated: whether the masks changed at its end.
        age: number of steps since the masks last changed, or since the start.
        seconds: duration.

    """

    phase: str
    density: float
    observed: bool
    updated: bool
    age: int
    seconds: float

    @property
    def counts(self) -> bool:
        """Whether it lies behind the steps that allocate, tune and compile."""
        return self.age >= SETTLE_STEPS


@dataclass(frozen=True)
class PhaseTimes:
    """Durations of the steps of one phase.

    Attributes:
        plain_s: (density, seconds) of a step outside the windows, by rising density.
        observing_s: (density, seconds) that an observed step takes beyond that.
        update_s: seconds that a mask update adds to its step.

    """

    plain_s: tuple[tuple[float, float], ...]
    observing_s: tuple[tuple[float, float], ...]
    update_s: float


def plain_seconds(steps: Iterable[Step]) -> float:
    """Return the median seconds of the steps that count and lie outside the windows."""
    return statistics.median(step.seconds for step in steps if step.counts and not step.observed)


def phase_times(steps: Sequence[Step]) -> dict[str, PhaseTimes]:
    """Sum up the steps of one or several sparse runs, by phase.

    A plain step is the median at its density. An observed step is the median of a window but its last, whose extra is
    the update; of several windows or updates the median counts. What only a first window pays, as a compilation does,
    is so left out.
    """
    found = {}
    for phase in dict.fromkeys(step.phase for step in steps):
        mine = [step for step in steps if step.phase == phase]
        plain: dict[float, float] = {}
        for density in sorted({step.density for step in mine}):
            plain[density] = plain_seconds(step for step in mine if step.density == density)
        observed: dict[float, list[float]] = {}
        updates = []
        for window in _windows(mine):
            seconds = statistics.median(step.seconds for step in window[:-1])
            observed.setdefault(window[0].density, []).append(seconds)
            updates.append(window[-1].seconds - seconds)
        found[phase] = PhaseTimes(
            plain_s=tuple(plain.items()),
            observing_s=tuple((d, max(0.0, statistics.median(s) - plain[d])) for d, s in sorted(observed.items())),
            update_s=max(0.0, statistics.median(updates)) if updates else 0.0,
        )
    return found


def whole_run(times: Mapping[str, PhaseTimes], schedule: Schedule) -> dict[str, dict[str, Any]]:
    """Add up a run's steps, phase by phase, each at the density and with the windows that `schedule` gives it.

    Between the densities that were measured, seconds go in straight lines.

    Returns:
        By phase: "steps", "observed_steps", "updates" and their seconds: "plain_s" (all steps without windows and
        updates), "observing_s", "updates_s", and the sum, "seconds".
    """
    phases: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, float], tuple[float, float]] = {}
    for step in range(schedule.total_steps):
        plan = schedule(step)
        key = plan.phase, plan.density
        if key not in known:
            phase = times[plan.phase]
            known[key] = _between(phase.plain_s, plan.density), _between(phase.observing_s, plan.density)
        plain_s, observing_s = known[key]
        sums = phases.setdefault(
            plan.phase,
            {"steps": 0, "observed_steps": 0, "updates": 0, "plain_s": 0.0, "observing_s": 0.0, "updates_s": 0.0},
        )
        sums["steps"] += 1
        sums["plain_s"] += plain_s
        if plan.observe:
            sums["observed_steps"] += 1
            sums["observing_s"] += observing_s
        if step + 1 < schedule.total_steps and schedule(step + 1).update:  # it happens at this step's end
            sums["updates"] += 1
            sums["updates_s"] += times[plan.phase].update_s
    for sums in phases.values():
        sums["seconds"] = sums["plain_s"] + sums["observing_s"] + sums["updates_s"]
    return phases


def _windows(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the stretches of observed steps that end in an update; one that a phase's end cuts off is left out."""
    windows: list[list[Step]] = []
    open_window: list[Step] = []
    for step in steps:
        if not step.observed:
            open_window = []
            continue
        open_window.append(step)
        if step.updated:
            if len(open_window) > 1:
                windows.append(open_window)
            open_window = []
    return windows


def _between(points: Sequence[tuple[float, float]], density: float) -> float:
    """Return the value at a density: on the line between its neighbours, at the ends that of the last point."""
    if not points:
        return 0.0
    index = bisect.bisect_left(points, (density,))
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (low, at_low), (high, at_high) = points[index - 1], points[index]
    return at_low + (at_high - at_low) * (density - low) / (high - low)
