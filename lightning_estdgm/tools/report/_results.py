"""Runs and arms in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_estdgm.tools._stats import percent
from lightning_estdgm.tools.report._curve import Curve
from lightning_estdgm.tools.report._finished_run import FinishedRun, Kind
from lightning_estdgm.tools.report._target import Mode, Target, best_value

_MAX_GAP = 0.15
"""Share of the steps to the target, between the value that met it and the one before, that is worth a warning."""


@dataclass(frozen=True)
class Point:
    """A run at one step.

    Attributes:
        step: Optimizer step.
        joules: Joules since the start; None where they were not logged around the step.
        seconds: Seconds since the start, likewise.
    """

    step: int
    joules: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunResult:
    """One run in numbers.

    Attributes:
        name: Folder, without the part that the folders of all runs share.
        seed: Seed given to Lightning's seed_everything; None if unknown.
        kind: Origin of the joules.
        joules: Joules of the whole run.
        seconds: Seconds of the whole run.
        best: Best value of the target's metric; None without one.
        final: Last value of the target's metric; None without one.
        reached: Point of the first logged value of the metric that meets the target; None if none does.
        missed_before: Step of the last logged value before it, which tells how exact ``reached`` is.
        budget: Point at the step that all runs came to.
        budget_best: Best value of the metric until then.
    """

    name: str
    seed: int | None
    kind: Kind
    joules: float | None
    seconds: float
    best: float | None
    final: float | None
    reached: Point | None
    missed_before: int | None
    budget: Point | None
    budget_best: float | None


@dataclass(frozen=True)
class Arm:
    """Runs of one method with one configuration, which differ in their seeds.

    Attributes:
        name: Label, or method with the settings that tell it from other arms.
        kind: Origin of the joules of all its runs.
        runs: Results of the runs.
    """

    name: str
    kind: Kind
    runs: tuple[RunResult, ...]


def result_of(run: FinishedRun, name: str, target: Target | None, budget: int | None) -> RunResult:
    """Numbers of a run: in whole, at the target, and at the step that all runs came to."""
    curve = run.metrics[target.metric] if target else Curve.of([])
    reached, before = _reach(curve, target) if target else (None, None)
    mode: Mode = target.mode if target else "min"
    return RunResult(
        name=name,
        seed=run.run.get("seed"),
        kind=run.kind,
        joules=run.energy["total_joules"],
        seconds=run.energy["seconds"],
        best=best_value(curve, mode),
        final=float(curve.values[-1]) if len(curve.values) else None,
        reached=None if reached is None else _point(run, reached),
        missed_before=before,
        budget=None if budget is None else _point(run, budget),
        budget_best=None if budget is None else best_value(curve, mode, budget),
    )


def _reach(curve: Curve, target: Target) -> tuple[int | None, int | None]:
    """Step of the first logged value that meets the target, and step of the one before."""
    met = np.flatnonzero([target.reached_by(value) for value in curve.values])
    if not len(met):
        return None, None
    first = int(met[0])
    return int(curve.steps[first]), int(curve.steps[first - 1]) if first else None


def coarse_warnings(arms: Sequence[Arm], target: Target | None) -> list[str]:
    """Warnings of arms whose metric was logged so rarely that the step that met the target is known only roughly."""
    found = []
    for arm in arms:
        gaps = [
            (run.reached.step - run.missed_before) / (run.reached.step + 1)
            for run in arm.runs
            if run.reached is not None and run.missed_before is not None
        ]
        if target and gaps and max(gaps) > _MAX_GAP:
            found.append(
                f"{arm.name}: {target.metric} was logged so rarely that the target may have been reached up to "
                f"{percent(max(gaps), 0)} of the steps earlier"
            )
    return found


def _point(run: FinishedRun, step: int) -> Point:
    return Point(step, run.joules.at(step), run.seconds.at(step))


def shared_kind(runs: Sequence[FinishedRun]) -> Kind:
    """Origin of the joules of several runs together."""
    kinds = {run.kind for run in runs}
    if len(kinds) == 1:
        return kinds.pop()
    return "unknown" if "unknown" in kinds else "partly estimated"
