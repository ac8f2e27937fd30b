"""What a schedule is, and the one implementation: masks change at given steps to given densities."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Plan:
    """What holds during one optimizer step.

    Attributes:
        phase: name of the phase the step belongs to.
        density: active share of the masked weights during this step, in (0, 1]: as set by the latest mask update.
        update: the masks are re-decided just before this step (never at step 0: there they are drawn, not re-decided).
        observe: this step's whole gradient is observed, for the mask update that follows.
        cycle: index of the cycle, from 0.
    """

    phase: str
    density: float
    update: bool
    observe: bool
    cycle: int = 0


@dataclass(frozen=True)
class Segment:
    """One phase of one cycle laid over the run: steps `first` to `last`, the latter excluded."""

    phase: str
    cycle: int
    first: int
    last: int


@runtime_checkable
class Schedule(Protocol):
    """A pure function of the optimizer step, for a run of `total_steps` steps."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The phases in order, without gaps, from step 0 to `total_steps`."""

    @property
    def densities(self) -> tuple[float, ...]:
        """The densities that masks take in the course of the run, in order."""

    def __call__(self, step: int) -> Plan:
        """Return what holds during optimizer step `step` (from 0; beyond the end, the last step's plan holds)."""

    def drop_progress(self, step: int) -> float:
        """Return how far the drop fraction is annealed at `step`: 0 at the start, 1 at the last mask update."""


class ScheduleConfig(ABC):
    """A schedule as a user configures it, for a run of any length: a frozen dataclass with these two methods.

    A class need not inherit from this one to be taken; one that does can also be named in YAML (``class_path``).
    """

    @abstractmethod
    def resolve(self, total_steps: int) -> Schedule:
        """Lay the schedule over a run of `total_steps` optimizer steps."""

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
    """A schedule given by the steps at which masks change, and the densities they change to.

    Attributes:
        total_steps: optimizer steps of the run.
        segments: the phases in order.
        changes: (step, density), the first at step 0.
        observe_steps: steps before each change in which gradients are observed.
        anneal_until: step at which the drop fraction is annealed; ``None`` takes the last change.

    """

    total_steps: int
    segments: tuple[Segment, ...]
    changes: tuple[tuple[int, float], ...]
    observe_steps: int
    anneal_until: int | None = None

    @property
    def densities(self) -> tuple[float, ...]:
        """The densities that masks take, in order."""
        return tuple(density for _, density in self.changes)

    def __call__(self, step: int) -> Plan:
        """Return what holds during optimizer step `step`."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        step = min(step, self.total_steps - 1)
        segment = self.segments[bisect.bisect_right(self.segments, step, key=lambda s: s.first) - 1]
        index = bisect.bisect_right(self.changes, step, key=lambda change: change[0]) - 1
        at, density = self.changes[index]
        upcoming = self.changes[index + 1][0] if index + 1 < len(self.changes) else math.inf
        return Plan(
            phase=segment.phase,
            density=density,
            update=at == step and step > 0,
            observe=upcoming - self.observe_steps <= step,
            cycle=segment.cycle,
        )

    def drop_progress(self, step: int) -> float:
        """Return how far the drop fraction is annealed at `step`."""
        last = self.changes[-1][0] if self.anneal_until is None else self.anneal_until
        return min(1.0, step / last) if last else 1.0


def intervals(update_every: int | None, observe_steps: int | None, total_steps: int) -> tuple[int, int]:
    """Return steps between mask updates and steps observed before each: the given ones, or those of the run's length.

    ``None`` takes 200 or a 25th of a shorter run, and 8 or a tenth of the interval where that is less.
    """
    every = update_every or max(1, min(200, total_steps // 25))
    return every, observe_steps or max(1, min(8, every // 10))
