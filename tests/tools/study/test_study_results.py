"""The committed results of the study: what is written about them is what their tables say."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_estdgm.method._masks import sides
from lightning_estdgm.sparse.autotune._unit_cost import STEPS_TO_A_LOSS
from lightning_estdgm.tools._stats import spread_text
from lightning_estdgm.tools.study._evidence_plan import cost_runs
from lightning_estdgm.tools.study._plans import plan_named
from lightning_estdgm.tools.study._results_table import ResultsTable, read_rows
from lightning_estdgm.tools.study._session import COSTS, summary
from lightning_estdgm.tools.study._settings import BEST_RATES, LOW_PEAK_LENGTH, MAGNITUDE, WEIGHT_AND_GRADIENT
from lightning_estdgm.tools.study._study_arm import arms
from lightning_estdgm.tools.study._tasks import task_named

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "study"
TABLES = sorted(path.stem for path in RESULTS.glob("*.csv") if not path.stem.endswith(COSTS))
EVIDENCE_COSTS = RESULTS / f"evidence{COSTS}.csv"


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_summary_is_that_of_its_table(name):
    costs = read_rows(EVIDENCE_COSTS) if name == "evidence" else ()
    assert (RESULTS / f"{name}.md").read_text() == summary(name, read_rows(RESULTS / f"{name}.csv"), costs)


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_table_holds_runs_of_its_plan_as_they_are_now(name):
    rows = read_rows(RESULTS / f"{name}.csv")
    costs = read_rows(EVIDENCE_COSTS) if name == "evidence" else ()
    runs = {run.key: run for run in plan_named(name, rows, costs)}
    for row in rows:
        assert row["key"] in runs
        assert row["steps"] == runs[row["key"]].steps


def test_committed_costs_are_of_the_rates_that_the_table_of_evidence_chose():
    runs = {run.key: run for run in cost_runs(read_rows(RESULTS / "evidence.csv"))}
    rows = read_rows(EVIDENCE_COSTS)
    assert rows
    for row in rows:
        assert row["key"] in runs
        assert row["served_joules"] > 0


@pytest.mark.parametrize("name", ["rates", "headline", "blocks", "ablations", "methods", "units"])
def test_a_plan_is_committed_whole(name):
    assert not ResultsTable(RESULTS / f"{name}.csv").lacks(plan_named(name))


def test_steps_to_a_loss_are_those_of_the_runs_of_units():
    loss = {(row["settings"], row["length"]): row["val_loss"] for row in read_rows(RESULTS / "units.csv")}
    single = [(length, loss['{"block_size": 1}', length]) for length in (0.5, 0.75, 1.0)]
    for unit, steps in STEPS_TO_A_LOSS.items():
        keep = {} if unit == 1 else MAGNITUDE if math.prod(sides(unit)) < 256 else WEIGHT_AND_GRADIENT
        mine = loss[json.dumps({"block_size": unit, **keep}, sort_keys=True), 1.0]
        (low, worse), (high, better) = next((a, b) for a, b in pairwise(single) if b[1] <= mine <= a[1])
        share = (worse - mine) / (worse - better)
        assert steps == pytest.approx(math.exp(-math.log(low) - share * math.log(high / low)), abs=0.006), unit


@pytest.mark.parametrize("task", sorted(BEST_RATES))
def test_best_rates_are_those_of_the_sweep(task):
    found: dict[str, tuple[float, float]] = {}
    for arm in arms(read_rows(RESULTS / "rates.csv")):
        if arm.task == task:
            found[arm.method] = min(found.get(arm.method, (float("inf"), 0.0)), (arm.loss, arm.lr))
    assert {method: lr for method, (_, lr) in found.items()} == BEST_RATES[task]
    assert set(BEST_RATES[task].values()) <= set(task_named(task).rates)


@pytest.mark.parametrize("task", sorted(LOW_PEAK_LENGTH))
def test_runs_with_a_low_peak_ask_for_hardly_more_flops_than_static_masks(task):
    rows = [row for row in read_rows(RESULTS / "headline.csv") if row["task"] == task]
    low_peak = [row for row in rows if row["length"] == LOW_PEAK_LENGTH[task] and '"keep"' in row["settings"]]
    static = [row for row in rows if row["method"] == "static"]
    assert len(low_peak) == len(static) == 3
    cost = [sum(row["flops_ratio"] * row["length"] for row in some) for some in (low_peak, static)]
    assert cost[0] <= 1.04 * cost[1]


def test_the_page_says_of_the_dense_references_what_their_table_says():
    page = (RESULTS.parent / "evidence.md").read_text()
    for arm in arms(read_rows(RESULTS / "references.csv")):
        graph, network = arm.task.split("-")
        name = f"{network.upper()}, {graph.title().replace('seer', 'Seer')}"
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f"| {spread_text(arm.spread, 1, scale=100)} | {len(arm.rows)} |")
