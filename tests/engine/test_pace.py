"""The pace of a run: positions in its schedule by the progress, before and after its length changes."""

import pytest

from helpers.controller_runs import STEPS, WEIGHTS, adamw
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._pace import Pace, saved_pace


def test_a_new_run_has_one_position_a_step():
    pace = Pace.even(40)
    assert [pace.position_at(step) for step in (0, 1, 39, 40, 45)] == [0, 1, 39, 40, 45]


@pytest.mark.parametrize("left", [1, 7, 30, 31, 1000])
def test_the_rest_is_spread_over_the_steps_that_are_left(left):
    pace = Pace.even(40).with_length((99, None), progress=12, position=10, left=left)
    positions = [pace.position_at(12 + step) for step in range(left + 1)]
    assert positions[0] == 10
    assert positions[-1] == 40
    assert positions[:-1] == sorted(p for p in positions if p < 40)
    rate = 30 / left
    assert all(abs(p - (10 + rate * i)) < 1 for i, p in enumerate(positions))
    assert pace.position_at(12 + left + 3) == 43


@pytest.mark.parametrize(("position", "left"), [(40, 100), (44, 100), (10, 0), (10, -5)])
def test_without_a_rest_a_step_is_a_position(position, left):
    pace = Pace.even(40).with_length((99, None), progress=12, position=position, left=left)
    assert [pace.position_at(12 + step) for step in range(3)] == [position, position + 1, position + 2]


def test_the_pace_is_restored():
    pace = Pace.even(40, 8).with_length((99, 9), progress=12, position=10, left=50)
    assert saved_pace({"pace": pace.state_dict()}) == pace
    assert saved_pace({"total_steps": 40}) == Pace.even(40)


def test_a_controller_goes_on_with_another_length(mlp):
    model = mlp(32, 64, 4)
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        state = dgm.state_dict() | {"steps": 10, "position": 10}
    with DGMController(model, adamw(model), WEIGHTS, total_steps=70, state=state, audit=False) as dgm:
        assert dgm.schedule.total_steps == STEPS == 40
        assert [dgm.pace.position_at(step) for step in (10, 12, 40, 70)] == [10, 11, 25, 40]
        again = dgm.state_dict()
    with DGMController(model, adamw(model), WEIGHTS, total_steps=70, state=again, audit=False) as dgm:
        assert dgm.pace == saved_pace(again)
