"""Contenders: their rates are chosen by the same rule on seeds of their own, and their runs grow with the table."""

import math

import pytest

from lightning_estdgm.tools.study import _evidence_plan
from lightning_estdgm.tools.study._contender import SEEDS, Contender
from lightning_estdgm.tools.study._evidence_plan import evidence
from lightning_estdgm.tools.study._standing import Standing, standings
from lightning_estdgm.tools.study._study_run import StudyRun

GPT = Contender("stdlib", "SET", "set", {"block_size": 1}, 0.1, choice_length=0.5)  # rates 1e-3, 2e-3, 4e-3


def row(run: StudyRun, loss: float, **more) -> dict:
    known = {"task": run.task, "method": run.method, "lr": run.lr, "seed": run.seed, "length": run.length}
    known |= {"key": run.key, "steps": run.steps, "status": "ok", "val_loss": loss, "val_accuracy": math.nan}
    known |= {
        "flops_ratio": 0.1,
        "flops": 10.0 * run.length,
        "seconds": 1000.0,  # of a busy machine
        "joules": 1000.0,
    }
    return {**known, **more}


def planned(rows=(), contender: Contender = GPT) -> list[StudyRun]:
    return [*contender.runs_of_budget(rows), *contender.runs_of_lengths(rows)]


def choices(losses: dict[float, float], contender: Contender = GPT) -> list[dict]:
    return [row(contender.run(lr, 100, contender.choice_length), loss) for lr, loss in losses.items()]


def test_only_the_choice_of_the_rate_is_planned_at_first():
    runs = planned()
    assert [(run.lr, run.seed, run.length) for run in runs] == [(lr, 100, 0.5) for lr in (1e-3, 2e-3, 4e-3)]
    assert not {run.seed for run in runs} & set(SEEDS)
    assert GPT.rate(()) is None
    partly = choices({1e-3: 1.0, 2e-3: 2.0})
    assert planned(partly) == runs


def test_a_best_rate_inside_is_reported_at_each_length_and_at_equal_flops():
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    assert GPT.rate(rows) == 2e-3
    reported = [run for run in planned(rows) if run.seed in SEEDS]
    assert {(run.lr, run.length) for run in reported} == {(2e-3, 1.0), (2e-3, 2.5)}, "a quarter at a tenth a step"
    assert len(reported) == 2 * len(SEEDS)


@pytest.mark.parametrize(
    ("losses", "added"), [({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 5e-4), ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, 8e-3)]
)
def test_a_best_rate_at_the_edge_asks_for_one_more_beyond_it(losses, added):
    rows = choices(losses)
    assert GPT.rate(rows) is None
    assert {run.lr for run in planned(rows)} == {*losses, added}
    inside = [*rows, *choices({added: 9.0})]
    assert GPT.rate(inside) == min(losses, key=losses.get)


def test_all_of_a_task_are_run_at_equal_flops_before_any_is_at_another_length(monkeypatch):
    other = Contender("stdlib", "dense", lengths=(0.5, 1.0), choice_length=0.5)
    monkeypatch.setattr(_evidence_plan, "EVIDENCE", (other, GPT))
    losses = {1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}
    rows = choices(losses, other)
    assert {(run.method, run.seed) for run in evidence(rows)} == {
        ("dense", 100), *(("dense", seed) for seed in SEEDS), ("set", 100)
    }  # fmt: skip
    rows += [*choices(losses), *(row(run, 1.0) for run in other.runs_of_budget(rows) if run.seed in SEEDS)]
    assert {run.length for run in evidence(rows) if run.seed in SEEDS} == {2.5}
    rows += [row(run, 1.0) for run in GPT.runs_of_budget(rows) if run.seed in SEEDS]
    last = [(run.method, run.length) for run in evidence(rows) if run.key not in {each["key"] for each in rows}]
    assert set(last) == {("dense", 0.5), ("dense", 1.0), ("set", 1.0)}
    assert len(last) == 3 * len(SEEDS)


def test_the_best_of_each_kind_is_run_by_the_joules_of_dense_last(monkeypatch):
    dense = Contender("stdlib", "dense", lengths=(1.0,), choice_length=0.5)
    narrow = [Contender("stdlib", f"small dense, {w}", settings={"model.width": w}, choice_length=0.5) for w in (8, 9)]
    ours = [Contender("stdlib", f"EST-DGM {u}", "est-dgm", {"block_size": u}, 0.1, choice_length=0.5) for u in (1, 4)]
    plan = (dense, *narrow, *ours, GPT)
    monkeypatch.setattr(_evidence_plan, "EVIDENCE", plan)
    rows, losses = [], {"dense": 1.0, "small dense, 8": 1.2, "small dense, 9": 1.1, "EST-DGM 1": 1.4, "EST-DGM 4": 1.5}
    for each in plan:
        rows += choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}, each)
        for runs in (each.runs_of_budget(rows), each.runs_of_lengths(rows)):
            rows += [row(run, losses.get(each.name, 0.1)) for run in runs if run.seed in SEEDS]
    keys = {each["key"] for each in rows}
    assert [run for run in evidence(rows) if run.key not in keys] == [], "nothing is known of joules"
    joules = {"dense": 1000.0, "small dense, 9": 190.0, "EST-DGM 1": 700.0, "small dense, 8": 1.0, "EST-DGM 4": 1.0}
    costs = [
        row(each.cost_run(2e-3), 1.0, joules=joules[each.name], served_joules=1.0) for each in plan if each is not GPT
    ]
    last = [(run.method, run.length) for run in evidence(rows, costs) if run.key not in keys]
    assert last == 3 * [("dense", 5.2)] + 3 * [("est-dgm", 1.4)]
    partly = [each for each in rows if each["method"] != "set"]
    assert not {run.length for run in evidence(partly, costs)} & {5.2, 1.4}, "others are not level yet"


def test_no_contender_tries_more_rates_than_the_others_may():
    losses = {lr: -lr for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}
    assert GPT.rate(choices(losses)) == 1.6e-2
    assert {run.lr for run in planned(choices(losses))} == set(losses)


def test_a_rate_that_diverged_is_not_chosen_and_accuracy_decides_where_it_does():
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    rows[1]["status"] = "diverged"
    assert GPT.rate(rows) != 2e-3
    graph = Contender("cora-gcn", "dense")
    found = [
        row(graph.run(lr, 100, 1.0), loss, val_accuracy=accuracy)
        for lr, loss, accuracy in ((0.003, 0.1, 0.7), (0.01, 0.5, 0.8), (0.03, 0.2, 0.6))
    ]
    assert graph.rate(found) == 0.01


def _standing(*points: tuple[int, float, float], costs=()) -> Standing:
    rows = tuple(row(GPT.run(2e-3, seed, length), loss) for seed, length, loss in points)
    return Standing(GPT, 2e-3, rows, dict(costs))


def test_the_cost_to_a_loss_is_where_the_mean_over_seeds_reaches_it():
    reached = _standing((0, 1.0, 2.0), (0, 4.0, 1.0), (1, 1.0, 1.6), (1, 4.0, 0.8))
    found = reached.cost_to(1.35, "flops")
    assert found.cost == pytest.approx(20.0)  # half way from 1.8 to 0.9, by the logarithm of 10 and 40
    assert found.seeds == pytest.approx([10 * 4**0.65, 10 * 4 ** (0.25 / 0.8)])
    assert not found.is_bound
    assert reached.cost_to(0.85, "flops") is None, "one seed alone is not the mean"
    assert reached.cost_to(1.9, "flops").is_bound
    some = _standing((0, 1.0, 1.0), (1, 1.0, 2.0)).cost_to(1.5, "flops")
    assert (some.cost, some.seeds, some.of) == (10.0, (10.0,), 2)


def test_runs_within_a_budget_are_the_longest_that_cost_no_more():
    standing = _standing((0, 1.0, 2.0), (0, 4.0, 1.0))
    assert [standing.longest_within(level, "flops") for level in (9.0, 10.0, 39.0, 40.0)] == [None, 1.0, 1.0, 4.0]
    assert standing.longest_within(1e9, "joules") is None, "no quiet run tells its joules"


def test_seconds_and_joules_are_those_of_a_quiet_run_times_the_steps():
    points = ((0, 1.0, 2.0), (0, 4.0, 1.0))
    assert math.isnan(_standing(*points).cost_to(1.5, "joules").cost)
    assert _standing(*points, costs={"joules": 0.5}).cost_to(1.5, "joules").cost == pytest.approx(1000.0)
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    rows += [row(GPT.run(2e-3, seed, length), 1.0) for seed in SEEDS for length in (1.0, 2.5)]
    run = GPT.cost_run(GPT.rate(rows))
    assert (run.lr, run.seed, run.length) == (2e-3, 0, 0.5)
    quiet = [row(run, 1.0, seconds=50.0, joules=250.0, served_joules=7.0)]
    (standing,) = standings([GPT], rows, quiet)
    assert standing.costs == {"seconds": 0.1, "joules": 0.5, "served_joules": 7.0}
    assert standing.cost_at(2.5, "joules") == pytest.approx(1250.0)
    (other,) = standings([GPT], rows, [row(GPT.run(1e-3, 0, 0.5), 1.0, seconds=50.0, joules=250.0, served_joules=7.0)])
    assert other.costs == {}, "of another rate"


def test_standings_hold_the_reported_runs_at_the_chosen_rate_alone():
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    assert standings([GPT], rows) == []
    rows += [row(GPT.run(2e-3, seed, 1.0), 1.0 + seed) for seed in SEEDS]
    rows += [row(GPT.run(1e-3, 0, 1.0), 9.0), row(GPT.run(2e-3, 0, 2.5), 9.0)]
    (standing,) = standings([GPT], rows)
    assert standing.scores(1.0)["values"] == [1.0, 2.0, 3.0]
    assert standing.lengths == (1.0,), "the other lacks seeds"
