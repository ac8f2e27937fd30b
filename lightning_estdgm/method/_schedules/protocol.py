"""Protocols of schedules, and `SteppedSchedule`, their one implementation: masks change at given steps.

The settings that resolve to it are in `estdgm` and `published`.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from lightning_estdgm._checks import check_int


@dataclass(frozen=True)
class Plan:
    """State of a schedule during one optimizer step.

    Attributes:
        phase: name of the phase the step belongs to.
        density: active share of the masked weights during this step, in (0, 1]: as set by the latest mask update.
        update: whether the masks are updated just before this step (never at step 0, where they are drawn).
        observe: whether this step's whole gradient is observed for the mask update that follows.
        cycle: index of the cycle, from 0.
    """

    phase: str
    density: float
    update: bool
    observe: bool
    cycle: int = 0


@dataclass(frozen=True)
class Segment:
    """One phase of one cycle of a run.

    Attributes:
        phase: name of the phase.
        cycle: index of the cycle, from 0.
        first: first step.
        last: step after the last one.

    """

    phase: str
    cycle: int
    first: int
    last: int


@runtime_checkable
class Schedule(Protocol):
    """A pure function of the optimizer step, for a run of `total_steps` steps.

    It may have a method `updates_in(steps)` as well, as `SteppedSchedule` does; see the function of that name.
    """

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Phases in order, without gaps, from step 0 to `total_steps`."""

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities of the masks in the course of the run, in order."""

    def __call__(self, step: int) -> Plan:
        """Return the plan of optimizer step `step`, from 0; after the end of the run, that of its last step."""

    def drop_progress(self, step: int) -> float:
        """Return the progress of the drop fraction at `step`: 0 at the start, 1 at the last mask update."""


def updates_in(schedule: Schedule, steps: range) -> bool:
    """Return whether the masks are updated at any of some consecutive steps of the run.

    A schedule with a method `updates_in` answers by itself; of another every step is asked for. In a run limited by
    time one optimizer step may go past thousands of steps of the schedule.
    """
    own: Callable[[range], bool] | None = getattr(schedule, "updates_in", None)
    return any(schedule(step).update for step in steps) if own is None else own(steps)


def sampled_densities(schedule: Schedule, most: int = 1000) -> list[float]:
    """Return the distinct densities of a schedule; of more than `most` those at the ends of phases, and every so many.

    These stay close enough together for what is rounded to buckets, such as a choice of backends.
    """
    distinct = list(dict.fromkeys(sorted(schedule.densities)))
    if len(distinct) <= most:
        return distinct
    ends = {schedule(step).density for segment in schedule.segments for step in (segment.first, segment.last - 1)}
    return sorted(ends.union(distinct[:: math.ceil(len(distinct) / most)]))


class ScheduleConfig(ABC):
    """Settings of a schedule for a run of any length. Any frozen dataclass with these two methods is one.

    A class need not inherit from this one; one that does can also be named in YAML (``class_path``).
    """

    @abstractmethod
    def resolve(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of `total_steps` optimizer steps."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types, to be compared with a checkpoint's."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _has(other, "resolve", "to_dict") if cls is ScheduleConfig else NotImplemented


def _has(cls: type, *methods: str) -> bool:
    return all(callable(getattr(cls, method, None)) for method in methods)


@dataclass(frozen=True)
class SteppedSchedule:
    """Schedule given by the steps at which masks change, and the densities they change to.

    Attributes:
        total_steps: number of optimizer steps of the run.
        segments: phases in order.
        changes: mask changes as ``(step, density)``, the first at step 0.
        observe_steps: number of steps before each change in which gradients are observed.
        anneal_until: step at which `drop_progress` reaches 1; ``None``: that of the last change.

    """

    total_steps: int
    segments: tuple[Segment, ...]
    changes: tuple[tuple[int, float], ...]
    observe_steps: int
    anneal_until: int | None = None

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities of the masks, in order."""
        return tuple(density for _, density in self.changes)

    @cached_property
    def _firsts(self) -> list[int]:
        return [segment.first for segment in self.segments]

    @cached_property
    def _at(self) -> list[int]:
        return [step for step, _ in self.changes]

    def __call__(self, step: int) -> Plan:
        """Return the plan of optimizer step `step`."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        step = min(step, self.total_steps - 1)
        segment = self.segments[bisect.bisect_right(self._firsts, step) - 1]
        index = bisect.bisect_right(self._at, step) - 1
        at, density = self.changes[index]
        upcoming = self.changes[index + 1][0] if index + 1 < len(self.changes) else math.inf
        return Plan(
            phase=segment.phase,
            density=density,
            update=at == step and step > 0,
            observe=upcoming - self.observe_steps <= step,
            cycle=segment.cycle,
        )

    def updates_in(self, steps: range) -> bool:
        """Return whether the masks are updated at any of some consecutive steps of the run."""
        index = bisect.bisect_left(self._at, max(steps.start, 1))
        return index < len(self._at) and self._at[index] < steps.stop

    def drop_progress(self, step: int) -> float:
        """Return the progress of the drop fraction at `step`."""
        last = self.changes[-1][0] if self.anneal_until is None else self.anneal_until
        return min(1.0, step / last) if last else 1.0


def intervals(update_every: int | None, observe_steps: int | None, total_steps: int) -> tuple[int, int]:
    """Return the number of steps between mask updates, and of observed steps before each, with defaults for ``None``.

    The defaults are 200, or a 25th of a shorter run; and 8, or a tenth of the interval where that is less.
    """
    every = update_every or max(1, min(200, total_steps // 25))
    return every, observe_steps or max(1, min(8, every // 10))


def check_intervals(update_every: int | None, observe_steps: int | None) -> None:
    """Raise TypeError or ValueError unless both are None or ints of at least 1, and windows fit between updates."""
    for name, value in (("update_every", update_every), ("observe_steps", observe_steps)):
        if value is not None:
            check_int(name, value, at_least=1)
    if update_every is not None and observe_steps is not None and observe_steps > update_every:
        raise ValueError(
            f"observe_steps must not exceed update_every, got {observe_steps} and {update_every}: windows lie between "
            "updates"
        )
