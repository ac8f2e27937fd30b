"""The three tables of the preset ``evidence``: energy to a loss, served cost, little data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev

from lightning_estdgm.tools._stats import Spread, percent, spread, spread_text
from lightning_estdgm.tools.study._contender import Rows
from lightning_estdgm.tools.study._evidence_plan import DENSE_NAME, EVIDENCE, narrower
from lightning_estdgm.tools.study._evidence_tasks import EVIDENCE_TASKS
from lightning_estdgm.tools.study._standing import Standing, best_of_budget, standings
from lightning_estdgm.tools.study._study_run import DENSE

NOT_RUN = "not run"
NOT_REACHED = "not reached"

_ABOUT = {
    "A. Energy to a loss": "Cost at which the mean over seeds reaches the mean score of the best dense network in its "
    "full length, as a share of what the task's own dense network costs in its full length; interpolated between runs "
    "of other lengths. ± is the sample deviation of the seeds' own costs; where some seeds alone do not reach it, "
    "their number is said instead. `<=`: the shortest runs reach it already. *Best* is the best mean score.",
    "B. Served cost": "All at about a quarter of dense's training FLOPs. *Weights served* are parameters that are not "
    "0, *joules served* those of a validation batch, packed where sparse: both as a share of dense's. *Ahead* is seed "
    "by seed, of the best narrower dense network: % of perplexity, or points.",
    "C. Little data": "Scores in as many steps as dense, at a quarter of its FLOPs, and of the longest runs that cost "
    "no more joules than dense's full length, with their share of those in brackets.",
}

_NOTES = (
    "Scores: validation loss in nats (`stdlib`, `wikitext`), test accuracy in per cent (others). Seconds and joules "
    "are those of a step of one run of each network that had the machine to itself, times the steps; joules are "
    "{method}. Where there is no such run they are *not run*."
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
        return self.dense.cost_at(1.0, cost)

    def budget_length(self, standing: Standing) -> float | None:
        """Length of equal FLOPs of one of them."""
        return standing.contender.budget_length(self.rows)

    @property
    def small_dense(self) -> Standing | None:
        """The best narrower dense network at equal FLOPs."""
        return best_of_budget(narrower(self.all), self.rows)


def fields(rows: Rows, costs: Rows = ()) -> list[Field]:
    """Return the tasks on which dense has runs of full length, in the order of the plan."""
    found = []
    for task in EVIDENCE_TASKS:
        mine = standings([each for each in EVIDENCE if each.task == task.name], rows, costs)
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


def tables(rows: Rows, costs: Rows = ()) -> dict[str, str]:
    """Return the tables as Markdown, by question."""
    found = fields(rows, costs)
    return {
        "A. Energy to a loss": _table(
            ("task", "network", "rate", "FLOPs to it", "seconds to it", "joules to it", "best", "command"),
            (cells for field in found for cells in _energy_rows(field)),
        ),
        "B. Served cost": _table(
            ("task", "network", "rate", "weights served", "joules served", "score", "ahead of small dense", "command"),
            (cells for field in found for cells in _served_rows(field)),
        ),
        "C. Little data": _table(
            ("task", "network", "rate", "equal steps", "its FLOPs", "equal FLOPs", "within its joules", "command"),
            (cells for field in found for cells in _little_data_rows(field)),
        ),
    }


def report(rows: Rows, costs: Rows = ()) -> str:
    """Return the three tables with what their columns mean, and what is not run yet, as Markdown.

    Args:
        rows: Rows of the plan's table.
        costs: Rows of its table of costs.

    """
    parts = [f"## {name}\n\n{_ABOUT[name]}\n\n{table}" for name, table in tables(rows, costs).items()]
    present = {(row.contender.task, row.contender.name) for field in fields(rows) for row in field.all}
    lacking = []
    for task in EVIDENCE_TASKS:
        names = [each.name for each in EVIDENCE if each.task == task.name]
        absent = [name for name in names if (task.name, name) not in present]
        if absent:
            lacking.append(f"- `{task.name}`: {'all' if len(absent) == len(names) else ', '.join(absent)}")
    if lacking:
        parts.append("## Not run yet\n\n" + "\n".join(lacking))
    methods = sorted({row["energy_method"] for row in costs if row["energy_method"]})
    return "\n\n".join([*parts, _NOTES.format(method=" or ".join(methods) or NOT_RUN)]) + "\n"


def _energy_rows(field: Field) -> Iterator[Sequence[str]]:
    for standing in field.all:
        means = [mean for length in standing.lengths if (mean := standing.scores(length)["mean"]) is not None]
        best = min(means) if standing.less_is_better else max(means)
        costs = [_cost_text(field, standing, cost) for cost in ("flops", "seconds", "joules")]
        yield _cells(field, standing, standing.lengths[-1], [*costs, _score(standing, spread([best]))])


def _cost_text(field: Field, standing: Standing, cost: str) -> str:
    found = standing.cost_to(field.target, cost)
    if found is None:
        return NOT_REACHED
    if math.isnan(found.cost / field.dense_cost(cost)):
        return NOT_RUN
    text = f"{'<= ' if found.is_bound else ''}{found.cost / field.dense_cost(cost):.2f}"
    if len(found.seeds) < found.of:
        return f"{text} ({len(found.seeds)} of {found.of} seeds)"
    return f"{text} ± {stdev(found.seeds) / field.dense_cost(cost):.2f}" if found.of > 1 else text


def _served_rows(field: Field) -> Iterator[Sequence[str]]:
    small, whole = field.small_dense, field.dense_cost("served_weights")
    for standing in field.all:
        length = field.budget_length(standing)
        mine = standing.at(length)
        if length is None or not mine:
            continue
        gap = NOT_RUN
        if small is not None:
            gap = spread_text(ahead(standing, length, small, field.budget_length(small)), 2, sign=True)
        served = percent(standing.cost_at(length, "served_weights") / whole)
        joules = standing.costs.get("served_joules", math.nan) / field.dense.costs.get("served_joules", math.nan)
        joules_text = NOT_RUN if math.isnan(joules) else f"{joules:.2f}"
        yield _cells(field, standing, length, [served, joules_text, _score(standing, standing.scores(length)), gap])


def _little_data_rows(field: Field) -> Iterator[Sequence[str]]:
    for standing in field.all:
        equal, length = standing.at(1.0), field.budget_length(standing)
        flops = f"{standing.cost_at(1.0, 'flops') / field.dense_cost('flops'):.2f}" if equal else NOT_RUN
        joules, level = NOT_RUN, field.dense_cost("joules")
        if (within := standing.longest_within(level, "joules")) is not None:
            share = standing.cost_at(within, "joules") / level
            joules = f"{_score(standing, standing.scores(within))} ({share:.2f})"
        elif "joules" in standing.costs:
            joules = "none"
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
