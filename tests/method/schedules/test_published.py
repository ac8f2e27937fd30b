"""Schedules of published methods: constant, cubic and alternating density."""

import re

import pytest

from lightning_estdgm.method._schedules import AlternatingDensity, ConstantDensity, CubicDensity


def test_the_cubic_by_hand():
    schedule = CubicDensity(0.1, start=0.5, begin=0.2, end=0.6, stop=0.8, update_every=10).resolve(100)
    densities = {step: schedule(step).density for step in range(100) if schedule(step).update}
    assert list(densities) == [30, 40, 50, 60, 70]
    assert list(densities.values()) == pytest.approx(
        [0.1 + 0.4 * 27 / 64, 0.1 + 0.4 * 8 / 64, 0.1 + 0.4 / 64, 0.1, 0.1], rel=1e-12
    )
    assert schedule(29).density == 0.5
    assert schedule.drop_progress(40) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConstantDensity(0.0), "density must lie in (0, 1], got 0.0"),
        (lambda: ConstantDensity(0.1, stop=1.5), "stop must lie in [0, 1], got 1.5"),
        (lambda: ConstantDensity(0.1, 4, 5), "observe_steps must not exceed update_every, got 5 and 4"),
        (lambda: CubicDensity(0.5, start=0.4), "density must not be above start, got 0.5 and 0.4"),
        (lambda: CubicDensity(0.5, begin=0.8), "begin must lie in [0, end), got 0.8 and 0.75"),
        (lambda: CubicDensity(0.5, stop=0.5), "stop must lie in [end, 1], got 0.5 and 0.75"),
        (lambda: CubicDensity(0.5, begin=0.7).resolve(3), "a run of 3 steps is too short to prune from 0.7 to 0.75"),
        (lambda: AlternatingDensity(0.1, period=0.1), "an odd number of phases of one period"),
        (
            lambda: AlternatingDensity(0.1).resolve(12),
            "a run of 12 steps is too short for periods of 0.05 of it: train longer, or set a longer period=",
        ),
    ],
)
def test_published_schedules_refuse_what_makes_no_sense(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
