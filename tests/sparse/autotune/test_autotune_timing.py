"""Timings of the never-slower choice, with clocks that advance as a script says: no test depends on this machine."""

import random

import pytest
import torch

from helpers.autotune_cases import ScriptedCase, linear_case
from lightning_estdgm.sparse.autotune._choice import choice_of
from lightning_estdgm.sparse.autotune._timing import AGAIN, LONG_ROUNDS, ROUNDS, Timing, measure_case, time_of_dense

NAMES = ["dense", "cpu", "native"]


def timed(spend, names=NAMES, **clocks):
    case = ScriptedCase(spend, **clocks)
    return case, measure_case(case, names, stopwatch=case.stopwatch())


def noisy(shares, seed, spread):
    """Each call takes its share of a second, times noise of a log-normal spread."""
    chance = random.Random(seed)
    return lambda name, call: 1e-2 * shares[name] * chance.lognormvariate(0.0, spread)


# ------------------------------------------------------------------ rounds


def test_the_calls_that_warm_up_do_not_count():
    seconds = {"dense": 4e-3, "cpu": 2e-3, "native": 3e-3}
    _, timing = timed(lambda name, call: seconds[name] if call else 3.0)
    assert timing.seconds == pytest.approx(seconds)
    assert len(timing.turns["dense"]) == ROUNDS
    assert choice_of(timing).backend == "cpu"


def test_no_name_always_comes_first_in_its_round():
    """The first call of a round pays 30 % for a cold cache: in a fixed order, sparse would seem that much faster."""
    case = ScriptedCase(lambda name, call: 4e-3)
    case.spend = lambda name, call: 4e-3 * (1.3 if sum(case.calls.values()) % 2 == 0 else 1.0)
    timing = measure_case(case, ["dense", "cpu"], stopwatch=case.stopwatch())
    assert len(timing.turns["cpu"]) == AGAIN * ROUNDS
    choice = choice_of(timing)
    assert choice.backend == "dense"
    assert choice.why.startswith("dense: the rounds disagree, sparse takes 0.77 to 1.30x the time (")


def test_a_machine_that_slows_down_slows_both():
    slowdown = {"dense": 4e-3, "cpu": 3e-3}
    _, timing = timed(lambda name, call: slowdown[name] * (1.0 + call), ["dense", "cpu"])
    assert len(timing.turns["cpu"]) == ROUNDS
    assert timing.ratios("cpu") == pytest.approx([0.75] * ROUNDS)
    assert timing.seconds["cpu"] == pytest.approx(0.75 * timing.seconds["dense"])
    # The control: turns of different rounds are far apart.
    assert max(timing.turns["cpu"]) > 1.5 * min(timing.turns["dense"])


def test_a_slow_round_does_not_move_the_seconds_that_are_shown():
    timing = Timing({"dense": [1.0, 1.0, 9.0], "cpu": [0.5, 0.6, 4.5]})
    assert timing.seconds == {"dense": 1.0, "cpu": 0.5}


def test_a_case_whose_rounds_disagree_is_timed_again_a_bounded_number_of_times():
    """One round in five is disturbed: what the middle of all rounds says holds."""
    case, timing = timed(lambda name, call: 1e-2 if name != "cpu" else 2e-2 if call % 5 == 2 else 5e-3)
    assert len(timing.turns["cpu"]) == AGAIN * ROUNDS
    assert not timing.agrees
    assert choice_of(timing).backend == "cpu"
    assert case.calls["cpu"] == 2 + AGAIN * ROUNDS


def test_dense_is_taken_where_the_rounds_still_disagree_and_said():
    _, timing = timed(lambda name, call: 1e-2 if name == "dense" else (5e-3, 2e-2)[call % 2], ["dense", "cpu"])
    choice = choice_of(timing)
    assert choice.backend == "dense"
    assert choice.why.startswith("dense: the rounds disagree, sparse takes 0.50 to 2.00x the time")


def test_long_rounds_are_fewer():
    case, timing = timed(lambda name, call: 0.2, ["dense", "cpu"])
    assert len(timing.turns["dense"]) == LONG_ROUNDS
    assert case.calls["dense"] == 2 + LONG_ROUNDS  # and two to warm up


def test_a_turn_of_a_short_call_is_many_calls():
    case, timing = timed(lambda name, call: 1e-4, ["dense", "cpu"])
    assert timing.seconds == pytest.approx({"dense": 1e-4, "cpu": 1e-4})
    assert case.calls["cpu"] == 2 + 10 * ROUNDS


def test_how_long_dense_takes_is_told_by_few_calls():
    case = ScriptedCase(lambda name, call: 3e-2)
    assert time_of_dense(case, case.stopwatch()) == pytest.approx(3e-2)
    assert sum(case.calls.values()) == 3


# ------------------------------------------------------------------ the same choice in another run


@pytest.mark.parametrize("native", [0.995, 1.0, 1.02])
@pytest.mark.parametrize("cpu", [0.3, 0.7, 0.85, 0.99, 1.02, 1.5])
def test_fresh_runs_choose_the_same_in_spite_of_noise(cpu, native):
    chosen = {
        choice_of(timed(noisy({"dense": 1.0, "cpu": cpu, "native": cpu * native}, seed, 0.02))[1]).backend
        for seed in range(25)
    }
    assert chosen == {"dense" if cpu > 0.95 else "cpu"}


def test_a_sparse_backend_that_is_clearly_faster_than_an_earlier_one_is_taken():
    for seed in range(25):
        _, timing = timed(noisy({"dense": 1.0, "cpu": 0.5, "native": 0.4}, seed, 0.02))
        assert choice_of(timing).backend == "native"


def test_what_is_compared_with_is_dense_whatever_the_order_of_a_mapping():
    assert choice_of({"cpu": 1.0, "dense": 2.0}) == choice_of({"dense": 2.0, "cpu": 1.0})


# ------------------------------------------------------------------ a busy machine


@pytest.mark.parametrize(
    ("own", "load", "busy"),
    [(1.0, 0.3, False), (0.95, 1.2, False), (0.8, 0.3, True), (1.0, 1.3, True), (1.0, None, False)],
)
def test_a_machine_is_busy_where_the_process_waits_or_the_load_is_high(own, load, busy):
    _, timing = timed(lambda name, call: 1e-2, ["dense", "cpu"], own=own, load=load)
    assert timing.own_share == pytest.approx(own)
    assert timing.load == load
    assert timing.busy is busy


def test_only_the_timed_calls_tell_how_busy_the_machine_is():
    """Waiting for a compiler while it warms up is no load."""
    case = ScriptedCase(lambda name, call: 1e-2, own=lambda calls: 0.1 if calls < 4 else 1.0)
    assert measure_case(case, ["dense", "cpu"], stopwatch=case.stopwatch()).own_share == pytest.approx(1.0)


def test_seconds_alone_are_a_timing_of_one_turn():
    timing = Timing.of({"dense": 2.0, "cpu": 1.0})
    assert timing.seconds == {"dense": 2.0, "cpu": 1.0}
    assert (timing.agrees, timing.busy) == (True, False)
    assert Timing.of(timing) is timing


def test_the_real_clocks_time_a_real_case():
    timing = measure_case(linear_case(), ["dense", "cpu"])
    assert timing.own_share is not None
    assert timing.own_share > 0.0
    assert all(torch.tensor(turns).gt(0).all() for turns in timing.turns.values())
