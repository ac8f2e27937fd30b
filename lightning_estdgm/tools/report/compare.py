"""What runs cost against each other, and whether that may be said at all: pure functions of what was read.

A saving is given for an arm only if all its runs, and all of the baseline, reached one target, and if their joules are
of one kind. Otherwise the reasons stand in its place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from lightning_estdgm.tools.report.fairness import settings_of, warnings_of
from lightning_estdgm.tools.report.runs import Curve, Kind, Run, common_metrics
from lightning_estdgm.tools.report.words import percent, text

__all__ = ["Arm", "Comparison", "Contrast", "Point", "RunResult", "Saving", "Target", "compare", "spread"]

Mode = Literal["min", "max"]

MAX_GAP = 0.15
"""Of the steps to the target, between the value that met it and the one before; more is worth a warning."""

# fmt: off
_LOWER_IS_BETTER = {"loss", "perplexity", "ppl", "error", "err", "mse", "mae", "rmse", "nll", "bpc", "bpb", "wer"}
_HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "iou", "bleu", "map", "psnr", "r2"}
# fmt: on


@dataclass(frozen=True)
class Target:
    """The value of a metric that a run has to reach; ``rule`` says where the value comes from."""

    metric: str
    value: float
    mode: Mode
    rule: str

    def reached_by(self, value: float) -> bool:
        """Is a value at least as good? Never so for nan."""
        return value <= self.value if self.mode == "min" else value >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'≤' if self.mode == 'min' else '≥'} {self.value:.6g}"


@dataclass(frozen=True)
class Point:
    """A run at one step: joules and seconds since its start, None where they were not logged around that step."""

    step: int
    joules: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunResult:
    """One run in numbers.

    Attributes:
        name: its folder, without what the folders of all runs have in common.
        seed: of Lightning's seed_everything, if known.
        kind: how far its joules are measured.
        joules, seconds: of the whole run.
        best, final: of the target's metric; None without one.
        reached: the first logged value of the metric that meets the target, None if none does.
        missed_before: the step of the last logged value before it: how exact ``reached`` is.
        budget: at the step that all runs came to.
        budget_best: the best value of the metric until then.
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
    """Runs of one method with one configuration, which differ in their seeds."""

    name: str
    kind: Kind
    runs: tuple[RunResult, ...]


@dataclass(frozen=True)
class Saving:
    """An arm against the baseline.

    share: joules saved, as a share of the baseline's; negative if it took more. speedup: the baseline's seconds over
    the arm's. Both as `spread` gives them: per pair of equal seeds where both arms have the same ones, else one ratio
    of the means, without a deviation.
    """

    joules_kind: Kind
    share: Mapping[str, Any]
    speedup: Mapping[str, Any]
    paired: bool


@dataclass(frozen=True)
class Contrast:
    """An arm against the baseline; ``reasons`` say why there is no saving, and are empty if there is one."""

    arm: str
    reasons: tuple[str, ...]
    at_target: Saving | None
    at_budget: Saving | None


@dataclass(frozen=True)
class Comparison:
    """All that a report says.

    Attributes:
        baseline: name of the arm that the others are compared with.
        arms: the baseline first.
        members: the runs of each arm, in the same order.
        target: None where no metric was named and none could be guessed; ``no_target`` says so then.
        budget_steps: the steps that all runs came to; None where a run logged no joules.
        contrasts: one for each arm but the baseline.
        warnings: what makes the comparison unfair or weak.
        settings: by name, what each arm ran with; several values of one arm are all there.
        differing: the names of the settings that are not the same in all runs.
    """

    baseline: str
    arms: tuple[Arm, ...]
    members: Mapping[str, tuple[Run, ...]]
    target: Target | None
    no_target: str
    budget_steps: int | None
    contrasts: tuple[Contrast, ...]
    warnings: tuple[str, ...]
    settings: Mapping[str, Mapping[str, tuple[str, ...]]]
    differing: frozenset[str]


def compare(
    runs: Sequence[Run], metric: str | None = None, target: float | None = None, mode: Mode | None = None
) -> Comparison:
    """Compare runs of one model, grouped into arms.

    Runs with one label are one arm; runs without are grouped by method and configuration. The baseline is the arm
    that uses no method, if there is exactly one, else the first.

    Args:
        runs: at least one.
        metric: the tag whose value the target is of; None takes the one that is named like a validation loss.
        target: the value to be reached; None takes the worst of the baseline runs' best values, so that each of them
            reaches it.
        mode: is a lower or a higher value better? None tells by the metric's name.

    Raises:
        ValueError: no runs; one run twice; runs of different models; a metric that not all runs have; a mode that
            the metric's name does not tell.
    """
    _check_runs(runs)
    names = _names(runs)
    arms = group(runs)
    plain = [name for name, members in arms.items() if all(run.method is None for run in members)]
    baseline = plain[0] if len(plain) == 1 else next(iter(arms))
    arms = {baseline: arms[baseline], **arms}
    goal, no_target = _choose_target(runs, arms[baseline], metric, target, mode)
    ends = [run.joules.steps[-1] for run in runs if len(run.joules.steps)]
    budget = int(min(ends)) if len(ends) == len(runs) else None
    results = tuple(
        Arm(name, _kind(members), tuple(_result(run, names[run.path], goal, budget) for run in members))
        for name, members in arms.items()
    )
    settings = settings_of(arms)
    differing = frozenset(
        name for name, by_arm in settings.items() if len({value for values in by_arm.values() for value in values}) > 1
    )
    return Comparison(
        baseline=baseline,
        arms=results,
        members={name: tuple(members) for name, members in arms.items()},
        target=goal,
        no_target=no_target,
        budget_steps=budget,
        contrasts=tuple(_contrast(results[0], arm, arms, goal, no_target, budget) for arm in results[1:]),
        warnings=(*warnings_of(arms, names, settings, differing), *_coarse(results, goal)),
        settings=settings,
        differing=differing,
    )


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one value), None if any value is missing.

    >>> spread([1.0, 3.0])["mean"], round(spread([1.0, 3.0])["std"], 4), spread([2.0])["std"]
    (2.0, 1.4142, None)
    """
    found = list(values)
    known = [v for v in found if v is not None]
    if not known or len(known) < len(found):
        return {"mean": None, "std": None, "values": found}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None, "values": known}


# Arms -------------------------------------------------------------------------------------------------------


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by arm, in the order in which they were named.

    Without a label, runs of one method are one arm if their configurations agree; arms of one method are told apart
    by what differs.
    """
    labelled: dict[str, list[Run]] = {}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        if run.label is not None:
            labelled.setdefault(run.label, []).append(run)
        else:
            name = "dense" if run.method is None else str(run.method.get("name", "unnamed method"))
            found.setdefault((name, tuple(_configuration(run).items())), []).append(run)
    arms = dict(labelled)
    for (name, configuration), members in found.items():
        others = [dict(c) for n, c in found if n == name and c != configuration]
        own = [f"{key} {value}" for key, value in configuration if any(other.get(key) != value for other in others)]
        title = ", ".join([name, *own])
        arms[title] = [*arms.get(title, []), *members]
    return arms


def _configuration(run: Run) -> dict[str, str]:
    """What makes runs of one method seeds of each other."""
    settings = ("batch_size", "accumulate_grad_batches", "world_size", "precision", "strategy", "compiled")
    method = run.method or {}
    return {
        **{name.replace("_", " "): text(run.run.get(name)) for name in settings},
        **({"schedule": text(method["schedule"])} if "schedule" in method else {}),
    }


def _check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("got no run, expected at least one")
    seen: dict[Any, Run] = {}
    for run in runs:
        place = run.path.resolve()
        if place in seen:
            raise ValueError(f"{run.path}: named twice, which would count its joules twice")
        seen[place] = run
    first = runs[0]
    for run in runs[1:]:
        models = run.run["model"], first.run["model"]
        # A fingerprint is None where the parameters had no shapes yet.
        if any(len({model.get(key) for model in models} - {None}) > 1 for key in ("class", "fingerprint")):
            raise ValueError(
                f"expected runs of one model, got two: {first.path} is {_model_text(first)}, "
                f"{run.path} is {_model_text(run)}"
            )


def _names(runs: Sequence[Run]) -> dict[Path, str]:
    """By folder, the shortest end of it that tells the runs apart."""
    folders = [run.path.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders])
    return {run.path: os.path.relpath(folder, common) for run, folder in zip(runs, folders, strict=True)}


def _model_text(run: Run) -> str:
    model = run.run["model"]
    fingerprint = str(model.get("fingerprint"))[:12]
    return f"{model.get('class')} with {model.get('parameters')} parameters (fingerprint {fingerprint})"


# The target ---------------------------------------------------------------------------------------------------


def _choose_target(
    runs: Sequence[Run], baseline: Sequence[Run], metric: str | None, value: float | None, mode: Mode | None
) -> tuple[Target | None, str]:
    shared = common_metrics(runs)
    if metric is None:
        if value is not None or mode is not None:
            raise ValueError(f"a target or a mode needs the metric that it is of; got none, expected one of {shared}")
        likely = [tag for tag in shared if _is_validation_loss(tag)]
        if len(likely) != 1:
            found = ", ".join(shared) or "none"
            return None, f"no metric was named, and none can be told to be the validation loss (all runs have: {found})"
        metric = likely[0]
    for run in runs:
        if metric not in run.metrics:
            raise ValueError(f"{run.path} has no metric {metric!r}; it has {', '.join(sorted(run.metrics)) or 'none'}")
    mode = mode or _mode_of(metric)
    if value is not None:
        if not math.isfinite(value):
            raise ValueError(f"target: got {value}, expected a number")
        return Target(metric, value, mode, "as asked for"), ""
    best = [_best(run.metrics[metric], mode) for run in baseline]
    known = [b for b in best if b is not None]
    if len(known) < len(best):
        return None, f"a run of the baseline has no finite value of {metric}"
    worst = max(known) if mode == "min" else min(known)
    rule = "best value of the baseline run" if len(best) == 1 else "the worst of the baseline runs' best values"
    return Target(metric, worst, mode, rule), ""


def _words(tag: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", tag.lower()) if word}


def _is_validation_loss(tag: str) -> bool:
    words = _words(tag)
    return bool(words & {"val", "valid", "validation"}) and "loss" in words and "step" not in words


def _mode_of(metric: str) -> Mode:
    words = _words(metric)
    low, high = bool(words & _LOWER_IS_BETTER), bool(words & _HIGHER_IS_BETTER)
    if low == high:
        raise ValueError(f"mode of {metric!r}: its name does not tell whether low or high is good; expected min or max")
    return "min" if low else "max"


def _best(curve: Curve, mode: Mode, last_step: float = math.inf) -> float | None:
    values = curve.finite().values[curve.finite().steps <= last_step]
    return float(values.min() if mode == "min" else values.max()) if len(values) else None


# One run --------------------------------------------------------------------------------------------------------


def _result(run: Run, name: str, target: Target | None, budget: int | None) -> RunResult:
    curve = run.metrics[target.metric] if target else Curve.of([])
    reached, before = _reach(curve, target) if target else (None, None)
    mode: Mode = target.mode if target else "min"
    return RunResult(
        name=name,
        seed=run.run.get("seed"),
        kind=run.kind,
        joules=run.energy["total_joules"],
        seconds=run.energy["seconds"],
        best=_best(curve, mode),
        final=float(curve.values[-1]) if len(curve.values) else None,
        reached=None if reached is None else _point(run, reached),
        missed_before=before,
        budget=None if budget is None else _point(run, budget),
        budget_best=None if budget is None else _best(curve, mode, budget),
    )


def _reach(curve: Curve, target: Target) -> tuple[int | None, int | None]:
    """The step of the first logged value that meets the target, and the step of the one before."""
    met = np.flatnonzero([target.reached_by(value) for value in curve.values])
    if not len(met):
        return None, None
    first = int(met[0])
    return int(curve.steps[first]), int(curve.steps[first - 1]) if first else None


def _coarse(arms: Sequence[Arm], target: Target | None) -> list[str]:
    """Where the metric was logged so rarely that the step at which it met the target is known but roughly."""
    found = []
    for arm in arms:
        gaps = [
            (run.reached.step - run.missed_before) / (run.reached.step + 1)
            for run in arm.runs
            if run.reached is not None and run.missed_before is not None
        ]
        if target and gaps and max(gaps) > MAX_GAP:
            found.append(
                f"{arm.name}: {target.metric} was logged so rarely that the target may have been reached up to "
                f"{percent(max(gaps), 0)} of the steps earlier"
            )
    return found


def _point(run: Run, step: int) -> Point:
    return Point(step, run.joules.at(step), run.seconds.at(step))


def _kind(runs: Sequence[Run]) -> Kind:
    kinds = {run.kind for run in runs}
    if len(kinds) == 1:
        return kinds.pop()
    return "unknown" if "unknown" in kinds else "partly estimated"


# Against the baseline -----------------------------------------------------------------------------------------


def _contrast(
    base: Arm, arm: Arm, runs: Mapping[str, Sequence[Run]], target: Target | None, no_target: str, budget: int | None
) -> Contrast:
    reasons = [*_missed(base, target), *_missed(arm, target)] if target else [f"no target: {no_target}"]
    reasons += _unlike(base, arm, runs)
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


def _unlike(base: Arm, arm: Arm, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Why the joules of two arms are not of one kind."""
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
    ratios = _ratios(joules[1], joules[0], paired)
    share = spread(None if ratio is None else 1 - ratio for ratio in ratios)
    return Saving(arm.kind, share, spread(_ratios(seconds[0], seconds[1], paired)), paired)


def _ratios(over: Sequence[float | None], under: Sequence[float | None], paired: bool) -> list[float | None]:
    if paired:
        return [_ratio(o, u) for o, u in zip(over, under, strict=True)]
    return [_ratio(spread(over)["mean"], spread(under)["mean"])]


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None
