"""What a contender has reached: its reported runs, and the costs and scores that tables read off them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_estdgm.tools._stats import Spread, spread
from lightning_estdgm.tools.study._contender import SEEDS, Contender, Rows
from lightning_estdgm.tools.study._tasks import task_named

MEASURED = ("seconds", "joules")
"""Costs that a busy machine changes; only quiet runs have them."""


@dataclass(frozen=True)
class Standing:
    """A contender's reported runs.

    Attributes:
        contender: The contender.
        lr: Its rate.
        rows: Rows of its reported runs at that rate.

    """

    contender: Contender
    lr: float
    rows: tuple[Mapping[str, Any], ...]

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

    def cost_to(self, target: float, cost: str) -> Spread | None:
        """Return the cost at which each seed reaches a score, interpolated between lengths by the cost's logarithm.

        A seed that reaches it with its shortest run has that run's cost, which is then an upper bound.

        Args:
            target: Score.
            cost: ``"flops"``, ``"seconds"`` or ``"joules"``.

        Returns:
            The spread over seeds; ``None`` where a seed does not reach it, or its runs do not tell the cost.

        """
        crossings = [self._crossing(self._points(seed, cost), target) for seed in self.seeds]
        return spread(crossings) if crossings and None not in crossings else None

    def is_bound(self, target: float) -> bool:
        """Whether some seed reaches a score with its shortest run."""
        return any(self._reaches(self._points(seed)[0][1], target) for seed in self.seeds)

    def scores_at(self, level: float, cost: str) -> Spread | None:
        """Return the score of each seed at a cost, interpolated as by `cost_to`; ``None`` beyond the runs."""
        found = []
        for seed in self.seeds:
            points = self._points(seed, cost)
            pairs = [(a, b) for a, b in itertools.pairwise(points) if a[0] <= level <= b[0]]
            if not pairs:
                return None
            (low, worse), (high, better) = pairs[0]
            share = (math.log(level) - math.log(low)) / (math.log(high) - math.log(low))
            found.append(worse + share * (better - worse))
        return spread(found) if found else None

    @property
    def seeds(self) -> list[int]:
        """Seeds that have runs."""
        return [seed for seed in SEEDS if any(row["seed"] == seed for row in self.rows)]

    def _points(self, seed: int, cost: str = "flops") -> list[tuple[float, float]]:
        rows = [row for row in self.rows if row["seed"] == seed and is_known(row, cost)]
        return sorted((row[cost], self.score(row)) for row in rows)

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


def is_known(row: Mapping[str, Any], cost: str) -> bool:
    """Whether a row tells a cost: seconds and joules only of a run that had the machine to itself."""
    return not math.isnan(row[cost]) and (cost not in MEASURED or row["quiet"] == "True")


def standings(contenders: Sequence[Contender], rows: Rows) -> list[Standing]:
    """Return those contenders that have reported runs, in their order."""
    found = []
    for contender in contenders:
        lr = contender.rate(rows)
        mine = tuple(row for row in rows if row["lr"] == lr and row["seed"] in SEEDS and contender.owns(row))
        if lr is not None and mine:
            found.append(Standing(contender, lr, mine))
    return found
