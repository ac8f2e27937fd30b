"""What a contender has reached: its reported runs, and the costs and scores that tables read off them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from lightning_estdgm.tools._stats import Spread, spread
from lightning_estdgm.tools.study._contender import SEEDS, Contender, Rows
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._tasks import task_named

MEASURED = ("seconds", "joules")
"""Costs that only a quiet machine tells."""


@dataclass(frozen=True)
class Crossing:
    """Where a score is reached.

    Attributes:
        cost: Cost at which the mean over seeds reaches it.
        seeds: Costs at which each of those seeds does that reaches it by itself.
        of: Number of seeds.
        is_bound: Whether the shortest runs reach it already.

    """

    cost: float
    seeds: tuple[float, ...]
    of: int
    is_bound: bool


@dataclass(frozen=True)
class Standing:
    """A contender's reported runs.

    Attributes:
        contender: The contender.
        lr: Its rate.
        rows: Rows of its reported runs at that rate.
        costs: ``"seconds"`` and ``"joules"`` of a training step, and ``"served_joules"`` of a batch, where known.

    """

    contender: Contender
    lr: float
    rows: tuple[Mapping[str, Any], ...]
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def less_is_better(self) -> bool:
        """Whether scores are losses, and not accuracies."""
        return task_named(self.contender.task).metric == "loss"

    @cached_property
    def lengths(self) -> tuple[float, ...]:
        """Lengths of its runs, rising."""
        return tuple(sorted({row["length"] for row in self.rows}))

    def score(self, row: Mapping[str, Any]) -> float:
        """Return the deciding metric: validation loss in nats, or accuracy in points, in testing where there is that.

        A run that diverged has the worst.
        """
        if self.less_is_better:
            return float(row["val_loss"]) if row["status"] == "ok" else math.inf
        accuracy = row["test_accuracy"] if task_named(self.contender.task).is_tested else row["val_accuracy"]
        return 100.0 * float(accuracy) if row["status"] == "ok" else 0.0

    def at(self, length: float | None) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a length, by seed."""
        return sorted((row for row in self.rows if row["length"] == length), key=lambda row: row["seed"])

    def scores(self, length: float | None) -> Spread:
        """Return the scores at a length."""
        return spread([self.score(row) for row in self.at(length)])

    def cost_of(self, row: Mapping[str, Any], cost: str) -> float:
        """Return what a run costs: ``"flops"``, ``"seconds"`` or ``"joules"``; NaN where no quiet run tells it."""
        return float(row["steps"]) * self.costs.get(cost, math.nan) if cost in MEASURED else float(row[cost])

    def cost_at(self, length: float, cost: str) -> float:
        """Return the mean of `cost_of` over the runs of a length."""
        return fmean(self.cost_of(row, cost) for row in self.at(length))

    def cost_to(self, target: float, cost: str) -> Crossing | None:
        """Return the cost at which a score is reached, interpolated between lengths by the cost's logarithm.

        Args:
            target: Score.
            cost: ``"flops"``, ``"seconds"`` or ``"joules"``.

        Returns:
            The crossing; ``None`` where the mean over seeds does not reach it.

        """
        means = [(self.cost_at(each, cost), fmean(self.score(row) for row in self.at(each))) for each in self.lengths]
        crossing = self._crossing(means, target)
        if crossing is None:
            return None
        seeds = [self._crossing(self._points(seed, cost), target) for seed in self.seeds]
        is_bound = self._reaches(means[0][1], target)
        return Crossing(crossing, tuple(x for x in seeds if x is not None), len(seeds), is_bound)

    def longest_within(self, level: float, cost: str) -> float | None:
        """Return the length of its longest runs that cost no more; ``None`` where there is none."""
        return max((length for length in self.lengths if self.cost_at(length, cost) <= level), default=None)

    @property
    def seeds(self) -> list[int]:
        """Seeds that have runs."""
        return [seed for seed in SEEDS if any(row["seed"] == seed for row in self.rows)]

    def _points(self, seed: int, cost: str) -> list[tuple[float, float]]:
        rows = (row for row in self.rows if row["seed"] == seed)
        return sorted((self.cost_of(row, cost), self.score(row)) for row in rows)

    def _reaches(self, score: float, target: float) -> bool:
        return score <= target if self.less_is_better else score >= target

    def _crossing(self, points: Sequence[tuple[float, float]], target: float) -> float | None:
        for index, (cost, score) in enumerate(points):
            if not self._reaches(score, target):
                continue
            if not index or not math.isfinite(points[index - 1][1]):
                return cost
            before, worse = points[index - 1]
            share = (target - worse) / (score - worse)
            return math.exp(math.log(before) + share * (math.log(cost) - math.log(before)))
        return None


def standings(contenders: Sequence[Contender], rows: Rows, costs: Rows = ()) -> list[Standing]:
    """Return those contenders that have reported runs, in their order; lengths that lack seeds are left out.

    Args:
        contenders: Contenders.
        rows: Rows of the plan's table.
        costs: Rows of its table of costs.

    """
    found = []
    for contender in contenders:
        lr = contender.rate(rows)
        mine = [row for row in rows if row["lr"] == lr and row["seed"] in SEEDS and contender.owns(row)]
        seeds = Counter(row["length"] for row in mine)
        whole = tuple(row for row in mine if seeds[row["length"]] == len(SEEDS))
        if lr is not None and whole:
            found.append(Standing(contender, lr, whole, _costs_a_step(contender.cost_run(lr), costs)))
    return found


def best_of_budget(found: Sequence[Standing], rows: Rows) -> Standing | None:
    """Return the best of some of one task at equal FLOPs; ``None`` where none was run so.

    Args:
        found: Some of them.
        rows: Rows of the plan's table.

    """
    means = [(each.scores(each.contender.budget_length(rows))["mean"], each) for each in found]
    run = [(mean if each.less_is_better else -mean, each) for mean, each in means if mean is not None]
    return min(run, key=lambda one: one[0])[1] if run else None


def _costs_a_step(run: StudyRun, costs: Rows) -> dict[str, float]:
    for row in costs:
        if row["key"] == run.key:
            a_step = {cost: row[cost] / row["steps"] for cost in MEASURED}
            return {**a_step, "served_joules": row["served_joules"]}
    return {}
