"""From timed steps to a whole run: sums, medians and ratios."""

import pytest

from helpers.bench_cases import PHASES
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.tools.bench.train._summary import summarise
from lightning_estdgm.tools.bench.train._whole import PhaseTimes, Step, phase_times, whole_run


def test_a_whole_run_adds_up_every_step_at_its_density():
    schedule = EstDgm().resolve(10_000)
    times = {name: PhaseTimes(((0.05, 0.05), (0.8, 0.8)), ((0.05, 2.0), (0.8, 2.0)), 30.0) for name in PHASES}
    phases = whole_run(times, schedule)
    plans = [schedule(step) for step in range(10_000)]
    assert [phases[name]["steps"] for name in PHASES] == [1500, 3500, 5000]
    assert sum(p["plain_s"] for p in phases.values()) == pytest.approx(sum(plan.density for plan in plans))
    assert sum(p["observed_steps"] for p in phases.values()) == sum(plan.observe for plan in plans)
    assert sum(p["observing_s"] for p in phases.values()) == pytest.approx(2.0 * sum(plan.observe for plan in plans))
    updates = sum(plan.update for plan in plans)
    assert sum(p["updates"] for p in phases.values()) == updates
    assert sum(p["updates_s"] for p in phases.values()) == pytest.approx(30.0 * updates)
    for phase in phases.values():
        assert phase["seconds"] == pytest.approx(phase["plain_s"] + phase["observing_s"] + phase["updates_s"])
    # About one window of 8 in 200 steps, but none in the frozen last quarter of refinement.
    assert phases["exploration"]["observed_steps"] == 8 * phases["exploration"]["updates"]
    assert phases["refinement"]["observed_steps"] < 0.8 * 5000 * 8 / 200


def steps_of(phase, density, plain_s, window_s=None, last_s=None, first_s=100.0):
    """Two slow first steps, two plain ones, and a window of four."""
    first = [Step(phase, density, False, False, age, first_s) for age in range(2)]
    plain = [Step(phase, density, False, False, 2 + i, plain_s) for i in range(2)]
    window = [] if window_s is None else [Step(phase, density, True, False, 4 + i, window_s) for i in range(3)]
    return first + plain + window + ([] if last_s is None else [Step(phase, density, True, True, 7, last_s)])


def test_phase_times_leave_first_steps_out_and_tell_windows_from_updates():
    steps = steps_of("exploration", 0.7, 2.0, 3.0, 7.0) + steps_of("exploration", 0.6, 1.0, 1.5, 5.5)
    found = phase_times(steps)["exploration"]
    assert found.plain_s == ((0.6, 1.0), (0.7, 2.0))
    assert found.observing_s == ((0.6, 0.5), (0.7, 1.0))
    assert found.update_s == 4.0


def test_a_window_without_its_update_does_not_count():
    steps = steps_of("refinement", 0.1, 1.0, 9.0)
    found = phase_times(steps)["refinement"]
    assert (found.observing_s, found.update_s) == ((), 0.0)


def test_a_window_that_compiles_first_costs_what_the_others_cost():
    steps = steps_of("exploration", 0.7, 2.0, 3.0, 7.0)
    steps[4] = Step("exploration", 0.7, True, False, 4, 60.0)
    assert phase_times(steps)["exploration"].observing_s == ((0.7, 1.0),)


def run_of_all_phases(factor=1.0):
    values = (("exploration", 0.6), ("consolidation", 0.3), ("refinement", 0.1))
    return [s for name, d in values for s in steps_of(name, d, factor * d, factor * (d + 0.01), factor * (d + 0.05))]


def test_a_summary_compares_the_same_steps_and_shows_each_round():
    dense = [[Step("dense", 1.0, False, False, age, s) for age in range(5)] for s in (1.0, 1.2, 1.4)]
    energy = {"watts": {"dense": 100.0, **dict.fromkeys(PHASES, 50.0)}, "sources": ["nvml"]}
    found = summarise(dense, [run_of_all_phases(), run_of_all_phases(2.0)], 256, energy)
    whole, phases = found["whole"], found["phases"]
    assert found["dense"]["step_s"] == 1.2
    assert found["dense"]["items_per_s"] == pytest.approx(256 / 1.2)
    assert whole["seconds"] == pytest.approx(sum(p["seconds"] for p in phases.values()))
    assert whole["dense_seconds"] == pytest.approx(1.2 * whole["steps"])
    assert whole["speedup"] == pytest.approx(whole["dense_seconds"] / whole["seconds"])
    assert whole["joules"] == pytest.approx(50.0 * whole["seconds"])
    assert whole["joules_ratio"] == pytest.approx(100 * whole["dense_seconds"] / (50 * whole["seconds"]))
    for phase in phases.values():
        assert phase["speedup"] == pytest.approx(1.2 * phase["steps"] / phase["seconds"])
        assert phase["items_per_s"] == pytest.approx(256 / phase["step_s"])
        assert phase["plain_speedup"] >= phase["speedup"]
    first, second = found["by_round"]
    assert (first["dense_step_s"], second["dense_step_s"]) == pytest.approx((1.1, 1.3))  # of their neighbours
    assert first["whole"] / 1.1 == pytest.approx(2 * second["whole"] / 1.3)
    assert found["one_off"]["run_s"] == pytest.approx(2 * (100 - 0.9))
    without = summarise(dense, [run_of_all_phases()], 256, None)
    assert without["energy"] == "no counter"
    assert without["whole"]["joules"] is None
