"""Savings of an arm against the baseline, or the reasons why none can be stated.

A saving is given only if all runs of the arm, and all of the baseline, reached one target, and if their joules are of
one kind. Otherwise the reasons stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_estdgm.tools._stats import Spread, ratios, spread
from lightning_estdgm.tools.report._finished_run import FinishedRun, Kind
from lightning_estdgm.tools.report._overlap import some
from lightning_estdgm.tools.report._results import Arm, Point, RunResult
from lightning_estdgm.tools.report._target import Target


@dataclass(frozen=True)
class Saving:
    """Joules and seconds of an arm against the baseline.

    Attributes:
        joules_kind: Origin of the joules.
        share: Joules saved, as a share of the baseline's; negative if the arm took more.
        speedup: The baseline's seconds over the arm's.
        paired: Whether both are formed per pair of equal seeds, since both arms have the same ones, or else once from
            the means, without a deviation.
    """

    joules_kind: Kind
    share: Spread
    speedup: Spread
    paired: bool


@dataclass(frozen=True)
class Contrast:
    """An arm against the baseline.

    Attributes:
        arm: Name of the arm.
        reasons: Reasons why there is no saving; empty if there is one.
        at_target: Saving until the target was reached.
        at_budget: Saving at the step that all runs came to.
    """

    arm: str
    reasons: tuple[str, ...]
    at_target: Saving | None
    at_budget: Saving | None


def contrast_arms(
    base: Arm,
    arm: Arm,
    runs: Mapping[str, Sequence[FinishedRun]],
    target: Target | None,
    no_target: str,
    budget: int | None,
    overlaps: Mapping[Path, Sequence[str]],
    added: Mapping[Path, str],
) -> Contrast:
    """Hold an arm against the baseline.

    Args:
        base: Baseline.
        arm: Arm.
        runs: Runs by arm.
        target: Value to be reached; None for none.
        no_target: Reason why there is none.
        budget: Step that all runs came to.
        overlaps: By folder of a run, sentences on the runs that used one counter at the same time.
        added: By folder of a run whose joules include fits of others, a sentence on them.
    """
    reasons = [*_missed(base, target), *_missed(arm, target)] if target else [f"no target: {no_target}"]
    reasons += _unlike(base, arm, runs)
    members = [run.path for each in (base, arm) for run in runs[each.name]]
    reasons += [added[path] for path in members if path in added]
    reasons += some(dict.fromkeys(sentence for path in members for sentence in overlaps.get(path, ())))
    if not reasons:
        reasons += [
            f"{run.name}: no joules were logged around step {run.reached.step}, where it reached the target"
            for run in (*base.runs, *arm.runs)
            if run.reached is not None and not run.reached.joules
        ]
    if reasons:
        return Contrast(arm.name, tuple(reasons), None, None)
    at_budget = None
    if budget is not None and all(r.reached and r.reached.step <= budget for r in (*base.runs, *arm.runs)):
        at_budget = _saving(base, arm, lambda run: run.budget)
    return Contrast(arm.name, (), _saving(base, arm, lambda run: run.reached), at_budget)


def _missed(arm: Arm, target: Target) -> list[str]:
    missed = [run for run in arm.runs if run.reached is None]
    if not missed:
        return []
    of = f"{len(missed)} of {len(arm.runs)} runs" if len(arm.runs) > 1 else "its one run"
    best = ", ".join(f"{run.name}: {'no value' if run.best is None else f'{run.best:.6g}'}" for run in missed)
    return [f"{arm.name} missed {target} ({of}; best value of {best})"]


def _unlike(base: Arm, arm: Arm, runs: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Reasons why the joules of two arms are not of one kind."""
    for each in (base, arm):
        for run in each.runs:
            if run.kind == "unknown":
                return [f"the joules of {each.name} are not known: {run.name} had no energy source"]
    if base.kind != arm.kind:
        return [
            f"the joules of {base.name} are {base.kind}, those of {arm.name} {arm.kind}: "
            "an estimate says nothing about a measurement"
        ]
    covers = {name: frozenset(run.covers for run in runs[name]) for name in (base.name, arm.name)}
    if len(covers[base.name] | covers[arm.name]) > 1:
        texts = [f"{name}: {' / '.join(sorted(_cover_text(c) for c in found))}" for name, found in covers.items()]
        return [f"the joules are not of the same parts of the machine ({'; '.join(texts)})"]
    return []


def _cover_text(covers: Iterable[tuple[str, str]]) -> str:
    return " + ".join(f"{kind} {how}" for kind, how in sorted(covers)) or "nothing"


def _saving(base: Arm, arm: Arm, at: Callable[[RunResult], Point | None]) -> Saving:
    seeds = [sorted({run.seed for run in each.runs if run.seed is not None}) for each in (base, arm)]
    paired = seeds[0] == seeds[1] and len(seeds[0]) == len(base.runs) == len(arm.runs)
    sides = [sorted(each.runs, key=lambda run: run.seed or 0) if paired else list(each.runs) for each in (base, arm)]
    joules = [[point.joules if (point := at(run)) else None for run in side] for side in sides]
    seconds = [[point.seconds if (point := at(run)) else None for run in side] for side in sides]
    share = spread(None if ratio is None else 1 - ratio for ratio in ratios(joules[1], joules[0], paired))
    return Saving(arm.kind, share, spread(ratios(seconds[0], seconds[1], paired)), paired)
