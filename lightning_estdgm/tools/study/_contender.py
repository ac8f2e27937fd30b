"""A network and method that enters a comparison: its learning rate is chosen first, then it is run on other seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lightning_estdgm.tools.study._study_run import DENSE, StudyRun
from lightning_estdgm.tools.study._task import Task
from lightning_estdgm.tools.study._tasks import task_named

SEEDS = (0, 1, 2)
"""Seeds of the runs that are reported."""

MOST_RATES = 5
"""Number of learning rates that a contender may try."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Contender:
    """A network and method on a task.

    Attributes:
        task: Name of the task.
        name: Name in tables.
        method: ``"dense"``, or a preset's name.
        settings: As those of `StudyRun`.
        density: Final density.
        lengths: Numbers of steps at which it is run, as multiples of the task's.
        budget: Training FLOPs at which it is run besides, as a share of those of the task's own model, dense.
        choice_length: Number of steps in which its rate is chosen, as a multiple of the task's.
        choice_seeds: Seeds on which its rate is chosen; none of `SEEDS`.

    """

    task: str
    name: str
    method: str = DENSE
    settings: Mapping[str, Any] = field(default_factory=dict)
    density: float = 1.0
    lengths: tuple[float, ...] = (1.0,)
    budget: float = 0.25
    choice_length: float = 1.0
    choice_seeds: tuple[int, ...] = (100,)

    def run(self, lr: float, seed: int, length: float) -> StudyRun:
        """Return one run of it."""
        return StudyRun(self.task, self.method, lr, seed, self.density, length, self.settings)

    def owns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a table is a run of it."""
        own = self.run(row["lr"], int(row["seed"]), row["length"])
        return bool(own.key == row["key"])

    def runs_of_budget(self, rows: Rows) -> Iterator[StudyRun]:
        """Yield the runs that rows let name: those for choosing the rate, and then those at `budget_length`."""
        yield from self.choosing(rows)
        lr, length = self.rate(rows), self.budget_length(rows)
        if lr is not None and length is not None:
            yield from (self.run(lr, seed, length) for seed in SEEDS)

    def runs_of_lengths(self, rows: Rows) -> Iterator[StudyRun]:
        """Yield the runs at `lengths`, once the rate is chosen."""
        if (lr := self.rate(rows)) is not None:
            for length in self.lengths:
                yield from (self.run(lr, seed, length) for seed in SEEDS)

    def choosing(self, rows: Rows) -> list[StudyRun]:
        """Return the runs by which the rate is chosen: of the task's rates, and one more beyond while the last wins."""
        rates = sorted(task_named(self.task).rates)
        while (best := self._best(rates, rows)) in (rates[0], rates[-1]) and len(rates) < MOST_RATES:
            rates = [*rates, best * rates[-1] / rates[-2]] if best == rates[-1] else [best * best / rates[1], *rates]
            rates = [float(f"{rate:.3g}") for rate in rates]
        return [self.run(lr, seed, self.choice_length) for lr in rates for seed in self.choice_seeds]

    def rate(self, rows: Rows) -> float | None:
        """Return the rate that was best in the runs for choosing; ``None`` while some are lacking."""
        return self._best(sorted({run.lr for run in self.choosing(rows)}), rows)

    def _best(self, rates: Sequence[float], rows: Rows) -> float | None:
        found = {row["key"]: row for row in rows}
        keys = {lr: [self.run(lr, seed, self.choice_length).key for seed in self.choice_seeds] for lr in rates}
        if any(key not in found for of_rate in keys.values() for key in of_rate):
            return None
        task = task_named(self.task)
        return min(rates, key=lambda lr: fmean(_worseness(task, found[key]) for key in keys[lr]))

    def cost_run(self, lr: float) -> StudyRun:
        """Return the run whose seconds and joules count, at the chosen rate, as long as those for choosing."""
        return self.run(lr, SEEDS[0], self.choice_length)

    def budget_length(self, rows: Rows) -> float | None:
        """Return the length at which the FLOPs are `budget`, by a run for choosing; ``None`` while there is none."""
        key = self.run(min(task_named(self.task).rates), self.choice_seeds[0], self.choice_length).key
        ratios = [row["flops_ratio"] for row in rows if row["key"] == key]
        return float(f"{self.budget / ratios[0]:.2g}") if ratios else None


def _worseness(task: Task, row: Mapping[str, Any]) -> float:
    """Return what is to be small: validation loss, or the share of wrong answers; that decides where it is known."""
    if row["status"] != "ok":
        return float("inf")
    return float(row["val_loss"] if task.metric == "loss" else 1.0 - row["val_accuracy"])
