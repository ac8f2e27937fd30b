"""EST-DGM's own schedule: exploration, consolidation, refinement. Those of other methods are in `published`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_estdgm._checks import check_fraction, check_int, check_share
from lightning_estdgm.method._schedules.protocol import (
    Schedule,
    ScheduleConfig,
    Segment,
    SteppedSchedule,
    check_intervals,
    intervals,
)

WARMUP = "warmup"
"""Name of the dense phase that `EstDgm(warmup=...)` puts first."""

_FRACTION_TOLERANCE = 1e-6


def times(factor: float, density: float) -> float:
    """Return `factor` times `density`, at most 1."""
    return min(1.0, round(factor * density, 12))


@dataclass(frozen=True)
class Phase:
    """Phase of training in which the density goes linearly from `start` to `end`.

    Attributes:
        start: density at the phase's first step, in (0, 1].
        end: density at its last mask update, in (0, start].
        length: share of the run without warm-up (float), or number of optimizer steps in each cycle (int).
    """

    start: float
    end: float
    length: int | float

    def __post_init__(self) -> None:
        for name, density in (("start", self.start), ("end", self.end)):
            if not 0.0 < density <= 1.0:
                raise ValueError(f"density must lie in (0, 1], got {name}={density!r} in {self}")
        if self.end > self.start:
            raise ValueError(f"density must not rise inside a phase, got start={self.start} and end={self.end}")
        if isinstance(self.length, bool) or not isinstance(self.length, (int, float)):
            raise TypeError(f"length must be a share (float) or a number of steps (int), got {self.length!r}")
        if isinstance(self.length, float) and not 0.0 < self.length <= 1.0:
            raise ValueError(f"a phase length given as a share must lie in (0, 1], got {self.length!r}")
        if isinstance(self.length, int) and self.length < 1:
            raise ValueError(f"a phase length given in steps must be at least 1, got {self.length!r}")


@dataclass(frozen=True)
class EstDgm(ScheduleConfig):
    r"""Schedule of EST-DGM: cycles of exploration, consolidation and refinement.

    The mean density of the defaults is about 0.25. The last phase is always refinement, and its mask is frozen for the
    last `freeze` of it. Later cycles explore less: cycle `c` starts and ends its exploration at `peak_decay**c` times
    the density of the first, but never below where consolidation starts.

    Attributes:
        exploration: densities and length of the first phase of each cycle.
        consolidation: densities and length of the second phase.
        refinement: densities and length of the third phase.
        cycles: number of times that the three phases run; lengths given as shares are divided over the cycles.
        peak_decay: factor in (0, 1] on the exploration densities from one cycle to the next.
        warmup: dense steps before the first cycle: a share of the run (float) or a number of steps (int).
        update_every: number of steps between mask updates; ``None`` takes 200, or a 25th of a shorter run.
        observe_steps: number of steps before each update in which gradients of inactive units are observed; ``None``
            takes 8, or a tenth of `update_every` where that is less.
        freeze: share of the last refinement during which the mask no longer changes.

    Raises:
        ValueError: if settings contradict each other or, in `resolve`, the phases do not cover the run.

    Example:
        >>> schedule = EstDgm().resolve(1000)
        >>> schedule(0).phase, schedule(0).density, schedule(999).phase, schedule(999).density
        ('exploration', 0.7, 'refinement', 0.1)

    """

    exploration: Phase = field(default=Phase(0.70, 0.60, 0.15))
    consolidation: Phase = field(default=Phase(0.30, 0.20, 0.35))
    refinement: Phase = field(default=Phase(0.15, 0.10, 0.50))
    cycles: int = 1
    peak_decay: float = 0.75
    warmup: int | float = 0
    update_every: int | None = None
    observe_steps: int | None = None
    freeze: float = 0.25

    def __post_init__(self) -> None:
        for name, phase in self._phases().items():
            if not isinstance(phase, Phase):
                raise TypeError(f"{name} must be a Phase(start, end, length), got {phase!r}")
        lengths = [phase.length for phase in self._phases().values()]
        if len({type(length) for length in lengths}) != 1:
            raise ValueError(f"phase lengths must be all shares (float) or all steps (int), got {lengths}")
        if isinstance(lengths[0], float) and abs(sum(lengths) - 1.0) > _FRACTION_TOLERANCE:
            raise ValueError(f"phases must cover the run: shares must add up to 1, got {lengths}, sum {sum(lengths):g}")
        check_int("cycles", self.cycles, at_least=1)
        if isinstance(self.warmup, float):
            if not 0.0 <= self.warmup < 1.0:
                raise ValueError(f"warmup given as a share must lie in [0, 1), got {self.warmup!r}")
        else:
            check_int("warmup", self.warmup, at_least=0)
        check_intervals(self.update_every, self.observe_steps)
        check_share("peak_decay", self.peak_decay)
        check_fraction("freeze", self.freeze)

    @classmethod
    def low_density(cls, density: float = 0.10, **settings: Any) -> EstDgm:
        """Return a schedule of about the FLOPs of a constant density: its first phases are hardly denser than its last.

        Exploration goes from 1.5 to 1.2 times `density` for 0.05 of the run, consolidation on to `density` for 0.15,
        refinement stays there; the mean is 1.04 times `density`. docs/results/study.md says where this is worth
        its accuracy.

        Args:
            density: density of refinement, in (0, 1].
            settings: any of the other attributes.

        Example:
            >>> EstDgm.low_density(0.2, cycles=2).exploration
            Phase(start=0.3, end=0.24, length=0.05)

        """
        middle = times(1.2, density)
        return cls(
            Phase(times(1.5, density), middle, 0.05),
            Phase(middle, density, 0.15),
            Phase(density, density, 0.80),
            **settings,
        )

    @classmethod
    def sparse_to_denser(cls, density: float = 0.10, **settings: Any) -> EstDgm:
        """Return a schedule cheaper than a constant density: it explores at half of the density that it ends with.

        Exploration has half of `density` for 0.40 of the run, consolidation and refinement have `density`; the mean is
        0.8 times `density`. For single weights; docs/results/study.md says what it reaches at equal FLOPs.

        Args:
            density: density of consolidation and refinement, in (0, 1].
            settings: any of the other attributes.

        Example:
            >>> EstDgm.sparse_to_denser(0.2).exploration
            Phase(start=0.1, end=0.1, length=0.4)

        """
        half = times(0.5, density)
        return cls(Phase(half, half, 0.40), Phase(density, density, 0.10), Phase(density, density, 0.50), **settings)

    @property
    def first_density(self) -> float:
        """Density of the first masks of a run, whatever its length: phases given in steps fit only one."""
        return 1.0 if self.warmup else self.exploration.start

    def resolve(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of `total_steps` optimizer steps.

        Raises:
            ValueError: if the run is too short for the phases, or lengths in steps do not add up to it.

        """
        check_int("total_steps", total_steps, at_least=1)
        warmup = round(self.warmup * total_steps) if isinstance(self.warmup, float) else self.warmup
        segments = self._segments(warmup, total_steps)
        update_every, observe = intervals(self.update_every, self.observe_steps, total_steps)
        changes: list[tuple[int, float]] = [(0, 1.0)] if warmup else []
        for segment in segments:
            if segment.phase != WARMUP:
                changes += self._changes(segment, update_every, is_last=segment is segments[-1])
        return SteppedSchedule(
            total_steps=total_steps,
            segments=segments,
            changes=tuple(changes),
            observe_steps=observe,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return asdict(self)

    def _phases(self) -> dict[str, Phase]:
        return {
            "exploration": self.exploration,
            "consolidation": self.consolidation,
            "refinement": self.refinement,
        }

    def _segments(self, warmup: int, total_steps: int) -> tuple[Segment, ...]:
        phases = self._phases()
        lengths = [phase.length for phase in phases.values()]
        cycled = total_steps - warmup
        if isinstance(lengths[0], int):
            covered = self.cycles * sum(lengths)
            if covered != cycled:
                raise ValueError(
                    f"phases must cover the run: warm-up {warmup} + {self.cycles} cycle(s) of {sum(lengths):g} steps "
                    f"make {warmup + covered:g} steps, but the run has {total_steps}; lengths given as shares (floats) "
                    f"fit any run, and total_steps={warmup + covered:g} has this schedule end there"
                )
            ends = [sum(lengths[: i + 1]) for i in range(3)]
            borders = [warmup + c * sum(lengths) + end for c in range(self.cycles) for end in ends]
        else:
            shares = [sum(lengths[: i + 1]) for i in range(2)] + [1.0]
            borders = [
                warmup + round((c + share) / self.cycles * cycled) for c in range(self.cycles) for share in shares
            ]
        segments = [Segment(WARMUP, 0, 0, warmup)] if warmup else []
        first = warmup
        for index, last in enumerate(int(border) for border in borders):
            name = list(phases)[index % 3]
            if last <= first:
                raise ValueError(
                    f"a run of {total_steps} steps is too short for {self.cycles} cycle(s) of {lengths} after "
                    f"{warmup} warm-up steps: {name} of cycle {index // 3} would have no step: "
                    "train longer, take fewer cycles or warm-up steps, or give the phase a larger length"
                )
            segments.append(Segment(name, index // 3, first, last))
            first = last
        return tuple(segments)

    def _changes(self, segment: Segment, update_every: int, is_last: bool) -> list[tuple[int, float]]:
        """Return (step, density) of the segment's mask changes, evenly spaced and about `update_every` apart."""
        start, end = self._range(segment)
        length = segment.last - segment.first
        moving = length - round(self.freeze * length) if is_last else length
        gaps = max(1, round(moving / update_every))
        # Before a frozen stretch the last change comes at its border; elsewhere the next phase's first change does.
        count = gaps + 1 if moving < length else gaps
        changes = []
        for i in range(count):
            share = i / (count - 1) if count > 1 else float(is_last)
            density = end if share == 1.0 else start + (end - start) * share
            changes.append((segment.first + round(i * moving / gaps), density))
        return changes

    def _range(self, segment: Segment) -> tuple[float, float]:
        phase = self._phases()[segment.phase]
        if segment.phase != "exploration":
            return phase.start, phase.end
        factor = self.peak_decay**segment.cycle
        floor = self.consolidation.start
        start, end = (max(x * factor, min(floor, x)) for x in (phase.start, phase.end))
        return start, end
