"""The three tables of the preset ``evidence``: energy to a loss, served cost, little data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_estdgm.tools._stats import Spread, percent, spread, spread_text
from lightning_estdgm.tools.study._contender import Rows
from lightning_estdgm.tools.study._evidence_plan import DENSE_NAME, EVIDENCE
from lightning_estdgm.tools.study._evidence_tasks import EVIDENCE_TASKS
from lightning_estdgm.tools.study._standing import Standing, standings
from lightning_estdgm.tools.study._study_run import DENSE

NOT_RUN = "not run"
NOT_REACHED = "not reached"

_ABOUT = {
    "A. Energy to a loss": "Cost at which the mean score of the best dense network in its full length is reached, as a "
    "share of what the task's own dense network costs in its full length; interpolated between runs of other lengths, "
    "mean and sample deviation over seeds. `<=`: the shortest runs reach it already. *Best* is the best mean score.",
    "B. Served cost": "All at a quarter of dense's training FLOPs. *Weights served* are parameters that are not 0, as "
    "a share of dense's. *Ahead* is seed by seed, of the best narrower dense network: % of perplexity, or points. "
    "Joules a token in the packed form are not run.",
    "C. Little data": "Scores in as many steps as dense, at a quarter of its FLOPs, and at a quarter of its joules.",
}

_NOTES = (
    "Scores: validation loss in nats (`stdlib`, `wikitext`), test accuracy in per cent (others). Seconds and joules "
    "are those of runs that had the machine to themselves; where there are none they are *not run*."
)


@dataclass(frozen=True)
class Field:
    """All that have reported runs on one task.

    Attributes:
        task: Name of the task.
        dense: The task's own network, dense, with runs of full length.
        all: All of them, dense included.
        rows: Rows of the table.

    """

    task: str
    dense: Standing
    all: tuple[Standing, ...]
    rows: Rows

    @property
    def target(self) -> float:
        """Best mean score of dense networks, of any width, at their full length."""
        full = [mean for each in self.all if each.contender.method == DENSE if (mean := each.scores(1.0)["mean"])]
        return min(full) if self.dense.less_is_better else max(full)

    def dense_cost(self, cost: str) -> float:
        """Mean cost of the task's own network, dense, at its full length."""
        return fmean(row[cost] for row in self.dense.at(1.0))

    def budget_length(self, standing: Standing) -> float | None:
        """Length of equal FLOPs of one of them."""
        return standing.contender.budget_length(self.rows)

    @property
    def small_dense(self) -> Standing | None:
        """The best narrower dense network at equal FLOPs."""
        small = [s for s in self.all if s.contender.method == DENSE and s.contender.name != DENSE_NAME]
        means = {s.contender.name: s.scores(self.budget_length(s))["mean"] for s in small}
        run = [s for s in small if means[s.contender.name] is not None]
        sign = 1.0 if self.dense.less_is_better else -1.0
        return min(run, key=lambda s: sign * (means[s.contender.name] or 0.0), default=None)


def fields(rows: Rows) -> list[Field]:
    """Return the tasks on which dense has runs of full length, in the order of the plan."""
    found = []
    for task in EVIDENCE_TASKS:
        mine = standings([each for each in EVIDENCE if each.task == task.name], rows)
        dense = next((s for s in mine if s.contender.name == DENSE_NAME and s.at(1.0)), None)
        if dense is not None:
            found.append(Field(task.name, dense, tuple(mine), rows))
    return found


def ahead(standing: Standing, length: float | None, other: Standing, other_length: float | None) -> Spread:
    """Return by how much one is better than another, seed by seed: in % of perplexity, or in points of accuracy."""
    theirs = {row["seed"]: other.score(row) for row in other.at(other_length)}
    pairs = [(standing.score(row), theirs[row["seed"]]) for row in standing.at(length) if row["seed"] in theirs]
    if standing.less_is_better:
        return spread([100.0 * (math.exp(b - a) - 1.0) for a, b in pairs])
    return spread([a - b for a, b in pairs])


def tables(rows: Rows) -> dict[str, str]:
    """Return the tables as Markdown, by question."""
    found = fields(rows)
    return {
        "A. Energy to a loss": _table(
            ("task", "network", "rate", "FLOPs to it", "seconds to it", "joules to it, estimated", "best", "command"),
            (cells for field in found for cells in _energy_rows(field)),
        ),
        "B. Served cost": _table(
            ("task", "network", "rate", "weights served", "FLOPs", "score", "ahead of small dense", "command"),
            (cells for field in found for cells in _served_rows(field)),
        ),
        "C. Little data": _table(
            ("task", "network", "rate", "equal steps", "its FLOPs", "equal FLOPs", "equal joules", "command"),
            (cells for field in found for cells in _little_data_rows(field)),
        ),
    }


def report(rows: Rows) -> str:
    """Return the three tables with what their columns mean, and what is not run yet, as Markdown."""
    parts = [f"## {name}\n\n{_ABOUT[name]}\n\n{table}" for name, table in tables(rows).items()]
    present = {(row.contender.task, row.contender.name) for field in fields(rows) for row in field.all}
    lacking = []
    for task in EVIDENCE_TASKS:
        names = [each.name for each in EVIDENCE if each.task == task.name]
        absent = [name for name in names if (task.name, name) not in present]
        if absent:
            lacking.append(f"- `{task.name}`: {'all' if len(absent) == len(names) else ', '.join(absent)}")
    if lacking:
        parts.append("## Not run yet\n\n" + "\n".join(lacking))
    return "\n\n".join([*parts, _NOTES]) + "\n"


def _energy_rows(field: Field) -> Iterator[Sequence[str]]:
    for standing in field.all:
        means = [mean for length in standing.lengths if (mean := standing.scores(length)["mean"]) is not None]
        best = min(means) if standing.less_is_better else max(means)
        costs = [_cost_text(field, standing, cost) for cost in ("flops", "seconds", "joules")]
        yield _cells(field, standing, standing.lengths[-1], [*costs, _score(standing, spread([best]))])


def _cost_text(field: Field, standing: Standing, cost: str) -> str:
    if cost != "flops" and not any(row["quiet"] == "True" for row in standing.rows):
        return NOT_RUN
    found = standing.cost_to(field.target, cost)
    if found is None:
        return NOT_REACHED
    bound = "<= " if standing.is_bound(field.target) else ""
    return bound + spread_text(found, 2, scale=1.0 / field.dense_cost(cost))


def _served_rows(field: Field) -> Iterator[Sequence[str]]:
    small, whole = field.small_dense, field.dense_cost("served_weights")
    for standing in field.all:
        length = field.budget_length(standing)
        mine = standing.at(length)
        if not mine:
            continue
        gap = NOT_RUN
        if small is not None:
            gap = spread_text(ahead(standing, length, small, field.budget_length(small)), 2, sign=True)
        served = percent(fmean(row["served_weights"] for row in mine) / whole)
        flops = f"{fmean(row['flops'] for row in mine) / field.dense_cost('flops'):.2f}"
        yield _cells(field, standing, length, [served, flops, _score(standing, standing.scores(length)), gap])


def _little_data_rows(field: Field) -> Iterator[Sequence[str]]:
    for standing in field.all:
        equal, length = standing.at(1.0), field.budget_length(standing)
        flops = f"{fmean(row['flops'] for row in equal) / field.dense_cost('flops'):.2f}" if equal else NOT_RUN
        joules = NOT_RUN
        if all(row["quiet"] == "True" for row in (*standing.rows, *field.dense.at(1.0))):
            level = standing.contender.budget * field.dense_cost("joules")
            found = standing.scores_at(level, "joules")
            joules = "outside its runs" if found is None else _score(standing, found)
        scores = [_score(standing, standing.scores(each)) for each in (1.0, length)]
        yield _cells(field, standing, length or 1.0, [scores[0], flops, scores[1], joules])


def _score(standing: Standing, found: Spread) -> str:
    return NOT_RUN if found["mean"] is None else spread_text(found, 4 if standing.less_is_better else 1)


def _cells(field: Field, standing: Standing, length: float | None, cells: Sequence[str]) -> Sequence[str]:
    arm = standing.contender.run(standing.lr, 0, length or 1.0).arm_id
    command = f"`estdgm study --preset evidence --run {arm}`"
    return (field.task, standing.contender.name, f"{standing.lr:g}", *cells, command)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if not lines:
        return f"{NOT_RUN.capitalize()} yet."
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])
