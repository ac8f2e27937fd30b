"""Contenders: their rates are chosen by the same rule on seeds of their own, and their runs grow with the table."""

import math

import pytest

from lightning_estdgm.tools.study._contender import SEEDS, Contender
from lightning_estdgm.tools.study._standing import Standing, standings
from lightning_estdgm.tools.study._study_run import StudyRun

GPT = Contender("stdlib", "SET", "set", {"block_size": 1}, 0.1, choice_length=0.5)  # rates 1e-3, 2e-3, 4e-3


def row(run: StudyRun, loss: float, **more) -> dict:
    known = {"task": run.task, "method": run.method, "lr": run.lr, "seed": run.seed, "length": run.length}
    known |= {"key": run.key, "steps": run.steps, "status": "ok", "val_loss": loss, "val_accuracy": math.nan}
    known |= {
        "flops_ratio": 0.1,
        "flops": 10.0 * run.length,
        "seconds": run.length,
        "joules": run.length,
        "quiet": "False",
    }
    return {**known, **more}


def choices(losses: dict[float, float], contender: Contender = GPT) -> list[dict]:
    return [row(contender.run(lr, 100, contender.choice_length), loss) for lr, loss in losses.items()]


def test_only_the_choice_of_the_rate_is_planned_at_first():
    runs = list(GPT.runs(()))
    assert [(run.lr, run.seed, run.length) for run in runs] == [(lr, 100, 0.5) for lr in (1e-3, 2e-3, 4e-3)]
    assert not {run.seed for run in runs} & set(SEEDS)
    assert GPT.rate(()) is None
    partly = choices({1e-3: 1.0, 2e-3: 2.0})
    assert list(GPT.runs(partly)) == runs


def test_a_best_rate_inside_is_reported_at_each_length_and_at_equal_flops():
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    assert GPT.rate(rows) == 2e-3
    reported = [run for run in GPT.runs(rows) if run.seed in SEEDS]
    assert {(run.lr, run.length) for run in reported} == {(2e-3, 1.0), (2e-3, 2.5)}, "a quarter at a tenth a step"
    assert len(reported) == 2 * len(SEEDS)


@pytest.mark.parametrize(
    ("losses", "added"), [({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 5e-4), ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, 8e-3)]
)
def test_a_best_rate_at_the_edge_asks_for_one_more_beyond_it(losses, added):
    rows = choices(losses)
    assert GPT.rate(rows) is None
    assert {run.lr for run in GPT.runs(rows)} == {*losses, added}
    inside = [*rows, *choices({added: 9.0})]
    assert GPT.rate(inside) == min(losses, key=losses.get)


def test_no_contender_tries_more_rates_than_the_others_may():
    losses = {lr: -lr for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}
    assert GPT.rate(choices(losses)) == 1.6e-2
    assert {run.lr for run in GPT.runs(choices(losses))} == set(losses)


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


def _standing(*points: tuple[int, float, float], **more) -> Standing:
    rows = tuple(row(GPT.run(2e-3, seed, length), loss, **more) for seed, length, loss in points)
    return Standing(GPT, 2e-3, rows)


def test_costs_to_a_loss_are_interpolated_seed_by_seed():
    reached = _standing((0, 1.0, 2.0), (0, 4.0, 1.0), (1, 1.0, 1.5), (1, 4.0, 1.0))
    found = reached.cost_to(1.5, "flops")
    assert found["values"] == pytest.approx([20.0, 10.0])  # half way by the logarithm of 10 and 40; the shortest run
    assert reached.is_bound(1.5)
    assert not reached.is_bound(1.2)
    assert reached.cost_to(0.5, "flops") is None
    one_of_two = _standing((0, 1.0, 1.0), (1, 1.0, 2.0))
    assert one_of_two.cost_to(1.5, "flops") is None
    assert reached.scores_at(20.0, "flops")["values"] == pytest.approx([1.5, 1.25])
    assert reached.scores_at(80.0, "flops") is None


def test_seconds_and_joules_of_a_busy_machine_are_not_used():
    points = ((0, 1.0, 2.0), (0, 4.0, 1.0))
    assert _standing(*points).cost_to(1.5, "joules") is None
    assert _standing(*points, quiet="True").cost_to(1.5, "joules")["mean"] == pytest.approx(2.0)


def test_standings_hold_the_reported_runs_at_the_chosen_rate_alone():
    rows = choices({1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0})
    assert standings([GPT], rows) == []
    rows += [row(GPT.run(2e-3, seed, 1.0), 1.0 + seed) for seed in SEEDS]
    rows += [row(GPT.run(1e-3, 0, 1.0), 9.0)]
    (standing,) = standings([GPT], rows)
    assert standing.scores(1.0)["values"] == [1.0, 2.0, 3.0]
