"""Schedules of published methods: constant, cubic and alternating density. EST-DGM's own is in `estdgm`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from lightning_estdgm._checks import check_int, check_share
from lightning_estdgm.method._schedules.protocol import (
    Schedule,
    ScheduleConfig,
    Segment,
    SteppedSchedule,
    check_intervals,
    intervals,
)


@dataclass(frozen=True)
class ConstantDensity(ScheduleConfig):
    """Schedule of one density from the first step to the last; masks change every `update_every` steps until `stop`.

    Attributes:
        density: active share of the masked weights, in (0, 1].
        update_every: number of steps between mask updates; ``None`` takes 200, or a 25th of a shorter run.
        observe_steps: number of steps before each update in which gradients of inactive units are observed; ``None``
            takes 8, or a tenth of `update_every` where that is less.
        stop: share of the run after which masks change no more, in [0, 1]; 0 leaves the first masks as they are.

    Example:
        >>> schedule = ConstantDensity(0.1, update_every=10, stop=0.75).resolve(100)
        >>> [step for step in range(100) if schedule(step).update]
        [10, 20, 30, 40, 50, 60, 70]

    """

    density: float
    update_every: int | None = None
    observe_steps: int | None = None
    stop: float = 0.75

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_share("stop", self.stop, zero=True)
        check_intervals(self.update_every, self.observe_steps)

    def resolve(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of `total_steps` optimizer steps."""
        check_int("total_steps", total_steps, at_least=1)
        every, observe = intervals(self.update_every, self.observe_steps, total_steps)
        end = round(self.stop * total_steps)
        changes = [(step, self.density) for step in range(0, max(end, 1), every)]
        return SteppedSchedule(total_steps, (Segment("sparse", 0, 0, total_steps),), tuple(changes), observe, end)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return {"schedule": "ConstantDensity"} | asdict(self)


@dataclass(frozen=True)
class CubicDensity(ScheduleConfig):
    r"""Schedule of a density that falls along a cubic, fast at first: Zhu & Gupta, arXiv 1710.01878.

    .. math:: \rho_t = \rho_\text{end} + (\rho_\text{start} - \rho_\text{end}) (1 - x)^3

    where `x` goes from 0 to 1 between `begin` and `end`, in steps of about `update_every`.

    Attributes:
        density: density at the end, in (0, `start`].
        start: density at the start, in (0, 1].
        begin: share of the run at which the density starts to fall, in [0, `end`).
        end: share of the run at which it has fallen to `density`, in (0, 1].
        stop: share of the run until which masks go on changing at the final density; at least `end`, ``None``: `end`.
        update_every: see `ConstantDensity`.
        observe_steps: see `ConstantDensity`.

    """

    density: float
    start: float = 1.0
    begin: float = 0.0
    end: float = 0.75
    stop: float | None = None
    update_every: int | None = None
    observe_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("density", "start", "end"):
            check_share(name, getattr(self, name))
        if self.density > self.start:
            raise ValueError(f"density must not be above start, got {self.density} and {self.start}")
        if not 0.0 <= self.begin < self.end:
            raise ValueError(f"begin must lie in [0, end), got {self.begin} and {self.end}")
        if self.stop is not None and not self.end <= self.stop <= 1.0:
            raise ValueError(f"stop must lie in [end, 1], got {self.stop} and {self.end}")
        check_intervals(self.update_every, self.observe_steps)

    def resolve(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of `total_steps` optimizer steps.

        Raises:
            ValueError: if the run is too short for one update between `begin` and `end`.

        """
        check_int("total_steps", total_steps, at_least=1)
        every, observe = intervals(self.update_every, self.observe_steps, total_steps)
        first, last = round(self.begin * total_steps), min(round(self.end * total_steps), total_steps - 1)
        if last <= first:
            raise ValueError(
                f"a run of {total_steps} steps is too short to prune from {self.begin} to {self.end} of it: train "
                "longer, or set begin= and end= further apart"
            )
        count = max(1, round((last - first) / every))
        changes = [(0, self.start)]
        for i in range(1, count + 1):
            left = (1.0 - i / count) ** 3
            changes.append(
                (first + round(i * (last - first) / count), self.density + (self.start - self.density) * left)
            )
        stop = last if self.stop is None else round(self.stop * total_steps)
        changes += [(step, self.density) for step in range(last + every, min(stop, total_steps), every)]
        segments = (Segment("pruning", 0, 0, last), Segment("sparse", 0, last, total_steps))
        return SteppedSchedule(total_steps, segments, tuple(changes), observe, stop)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return {"schedule": "CubicDensity"} | asdict(self)


@dataclass(frozen=True)
class AlternatingDensity(ScheduleConfig):
    """Schedule of dense and sparse phases in turns, dense first, sparse last: AC/DC (Peste et al., arXiv 2106.12379).

    The masks change at the borders of phases only. The defaults are the paper's for 100 epochs of ImageNet.

    Attributes:
        density: density of the sparse phases, in (0, 1).
        warmup: share of the run that the first phase takes, which is dense.
        period: share of the run that each phase after it takes, sparse first, until the last two.
        last_dense: share of the run that the last dense phase takes.
        last_sparse: share of the run that the last sparse phase takes.
        observe_steps: see `ConstantDensity`; AC/DC itself needs no gradients.

    """

    density: float
    warmup: float = 0.10
    period: float = 0.05
    last_dense: float = 0.10
    last_sparse: float = 0.15
    observe_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("density", "warmup", "period", "last_dense", "last_sparse"):
            check_share(name, getattr(self, name))
        turns = self._turns()
        if turns < 1 or turns % 2 == 0 or abs(turns * self.period - self._between()) > 1e-6:
            raise ValueError(
                "between warmup and last_dense there must be an odd number of phases of one period, sparse first and "
                f"last: got {self._between():g} of the run for periods of {self.period:g}; change "
                "period=, warmup= or last_dense="
            )
        check_intervals(None, self.observe_steps)

    def _between(self) -> float:
        return 1.0 - self.warmup - self.last_dense - self.last_sparse

    def _turns(self) -> int:
        return round(self._between() / self.period)

    def resolve(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of `total_steps` optimizer steps.

        Raises:
            ValueError: if a phase would have no step.

        """
        check_int("total_steps", total_steps, at_least=1)
        starts = [0.0, *(self.warmup + i * self.period for i in range(self._turns() + 1)), 1.0 - self.last_sparse]
        borders = [round(share * total_steps) for share in starts] + [total_steps]
        segments, changes = [], []
        for i, (first, last) in enumerate(itertools.pairwise(borders)):
            if last <= first:
                raise ValueError(
                    f"a run of {total_steps} steps is too short for periods of {self.period:g} of it: train longer, or "
                    "set a longer period="
                )
            segments.append(Segment("dense" if i % 2 == 0 else "sparse", i // 2, first, last))
            changes.append((first, 1.0 if i % 2 == 0 else self.density))
        _, observe = intervals(None, self.observe_steps, total_steps)
        return SteppedSchedule(total_steps, tuple(segments), tuple(changes), observe)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return {"schedule": "AlternatingDensity"} | asdict(self)
