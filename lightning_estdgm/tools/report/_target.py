"""The value of a metric that runs are compared at."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_estdgm.tools.report._curve import Curve
from lightning_estdgm.tools.report._finished_run import FinishedRun, common_metrics

Mode = Literal["min", "max"]
"""Direction in which a metric gets better."""

# fmt: off
_LOWER_IS_BETTER = {"loss", "perplexity", "ppl", "error", "err", "mse", "mae", "rmse", "nll", "bpc", "bpb", "wer"}
_HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "iou", "bleu", "map", "psnr", "r2"}
# fmt: on


@dataclass(frozen=True)
class Target:
    """The value of a metric that a run has to reach.

    Attributes:
        metric: Tag of the metric.
        value: Value to be reached.
        mode: Direction in which the metric gets better.
        rule: Origin of the value, in words.
    """

    metric: str
    value: float
    mode: Mode
    rule: str

    def reached_by(self, value: float) -> bool:
        """Whether a value is at least as good; nan never is."""
        return value <= self.value if self.mode == "min" else value >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'≤' if self.mode == 'min' else '≥'} {self.value:.6g}"


def choose_target(
    runs: Sequence[FinishedRun],
    baseline: Sequence[FinishedRun],
    metric: str | None,
    value: float | None,
    mode: Mode | None,
) -> tuple[Target | None, str]:
    """The target of a comparison, or None and the reason for it; see `_comparison.compare` for the arguments.

    Raises:
        ValueError: A metric that not all runs have; a mode that the metric's name does not tell; a target or a mode
            without a metric.
    """
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
    best = [best_value(run.metrics[metric], mode) for run in baseline]
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


def best_value(curve: Curve, mode: Mode, last_step: float = math.inf) -> float | None:
    """Best finite value of a curve up to a step; None if there is none."""
    values = curve.finite().values[curve.finite().steps <= last_step]
    return float(values.min() if mode == "min" else values.max()) if len(values) else None
