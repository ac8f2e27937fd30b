"""The mask unit of a layer by its cost: time of a step, times the steps to a loss."""

import pytest

from lightning_estdgm.sparse.autotune._choice import Choice
from lightning_estdgm.sparse.autotune._unit_cost import AIMS, STEPS_TO_A_LOSS, choose_unit

SIZES = list(STEPS_TO_A_LOSS)


class Clock:
    """Seconds of a step by unit, at 1 s of dense; what is asked for is noted."""

    def __init__(self, **seconds):
        self.seconds = {"weight": 1, "4x1": (4, 1), "4x4": 4, "16x16": 16, "64x64": 64}
        self.seconds = {self.seconds[name]: value for name, value in seconds.items()}
        self.asked = []

    def __call__(self, size):
        self.asked.append(size)
        spent = self.seconds[size]
        return Choice("native" if spent <= 0.95 else "dense", 1.0, spent, "")


def test_the_finest_unit_has_the_fewest_steps_to_a_loss():
    assert next(iter(STEPS_TO_A_LOSS)) == 1
    assert list(STEPS_TO_A_LOSS.values()) == sorted(STEPS_TO_A_LOSS.values())
    assert STEPS_TO_A_LOSS[1] == 1.0


def test_a_unit_that_is_faster_by_more_than_it_takes_steps_is_chosen():
    clock = Clock(weight=0.4, **{"4x1": 0.2, "4x4": 0.19, "16x16": 0.18, "64x64": 0.15})
    unit, costs = choose_unit(SIZES, clock, 0.1, "auto")
    assert unit == (4, 1)
    assert costs[1] == 0.4
    assert costs[(4, 1)] == pytest.approx(0.2 * STEPS_TO_A_LOSS[(4, 1)])


def test_a_coarse_unit_that_learns_worse_is_not_chosen_for_a_little_speed():
    clock = Clock(weight=0.22, **{"4x1": 0.2, "4x4": 0.19, "16x16": 0.18, "64x64": 0.175})
    assert choose_unit(SIZES, clock, 0.1, "auto")[0] == 1
    assert choose_unit(SIZES, clock, 0.1, "fastest")[0] == 4  # 64 x 64 is less than a tenth faster: noise could be that


def test_a_unit_that_cannot_cost_less_is_not_timed():
    clock = Clock(weight=0.2, **{"4x1": 0.19})
    assert choose_unit(SIZES, clock, 0.16, "auto")[0] == 1  # 4 x 4 would take 0.144 at the least, times its steps
    assert clock.asked == [1, (4, 1)]


def test_where_no_unit_is_faster_than_dense_the_finest_is_as_fast_as_the_others():
    slow = Clock(**dict.fromkeys(("weight", "4x1", "4x4", "16x16", "64x64"), 1.5))
    for aim in AIMS:
        assert choose_unit(SIZES, slow, 0.1, aim)[0] == 1


def test_the_finest_unit_that_is_faster_than_dense():
    clock = Clock(weight=1.2, **{"4x1": 0.9, "4x4": 0.1})
    assert choose_unit(SIZES, clock, 0.1, "finest")[0] == (4, 1)
    assert clock.asked == [1, (4, 1)]
