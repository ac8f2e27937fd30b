"""Properties of all schedules."""

import itertools
import pickle

import pytest

from lightning_estdgm.method._schedules import (
    AlternatingDensity,
    ConstantDensity,
    CubicDensity,
    EstDgm,
    Phase,
    Schedule,
    ScheduleConfig,
)
from lightning_estdgm.method._schedules.protocol import (
    Segment,
    SteppedSchedule,
    intervals,
    sampled_densities,
    updates_in,
)
from lightning_estdgm.sparse._buckets import bucket_of

PUBLISHED = {
    "constant": ConstantDensity(0.1, update_every=7),
    "never": ConstantDensity(0.1, stop=0.0),
    "cubic": CubicDensity(0.1, begin=0.1, end=0.5, stop=0.9),
    "alternating": AlternatingDensity(0.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("total", [41, 100, 5000])
def test_published_schedules_keep_what_all_do(name, total):
    config = PUBLISHED[name]
    assert isinstance(config, ScheduleConfig)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.to_dict()["schedule"] == type(config).__name__
    schedule = config.resolve(total)
    assert isinstance(schedule, Schedule)
    assert [s.first for s in schedule.segments] == [0, *(s.last for s in schedule.segments[:-1])]
    assert schedule.segments[-1].last == total
    plans = [schedule(step) for step in range(total)]
    assert not plans[0].update
    for before, plan in itertools.pairwise(plans):
        assert plan.update or plan.density == before.density
        assert before.observe or not plan.update  # a window ends at every update
    assert [p.density for p in plans if p.update] == list(schedule.densities[1:])
    progress = [schedule.drop_progress(step) for step in range(total)]
    assert progress == sorted(progress)
    assert plans[-1].density == 0.1


def test_masks_change_at_given_steps_to_given_densities():
    segments = (Segment("first", 0, 0, 5), Segment("second", 1, 5, 10))
    schedule = SteppedSchedule(10, segments, ((0, 0.5), (4, 0.3), (8, 0.2)), observe_steps=2)
    plans = [schedule(step) for step in range(10)]
    assert [plan.density for plan in plans] == [0.5] * 4 + [0.3] * 4 + [0.2] * 2
    assert [step for step, plan in enumerate(plans) if plan.update] == [4, 8]
    assert [step for step, plan in enumerate(plans) if plan.observe] == [2, 3, 6, 7]
    assert [(plan.phase, plan.cycle) for plan in plans] == [("first", 0)] * 5 + [("second", 1)] * 5
    assert schedule.densities == (0.5, 0.3, 0.2)
    assert schedule(99) == schedule(9)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        schedule(-1)


class Asked:
    """A schedule of one's own, with what the protocol asks for and no more."""

    def __init__(self, schedule):
        self.total_steps, self.segments, self.densities = schedule.total_steps, schedule.segments, schedule.densities
        self.drop_progress = schedule.drop_progress
        self.schedule, self.steps = schedule, []

    def __call__(self, step):
        self.steps.append(step)
        return self.schedule(step)


@pytest.mark.parametrize("name", PUBLISHED)
def test_updates_are_found_without_a_visit_to_each_step(name):
    schedule = PUBLISHED[name].resolve(60)
    for first, stop in itertools.combinations_with_replacement(range(61), 2):
        steps = range(first, stop)
        assert updates_in(schedule, steps) == any(schedule(step).update for step in steps)


def test_of_a_schedule_that_cannot_find_its_updates_every_step_is_asked_for():
    own = Asked(PUBLISHED["constant"].resolve(60))
    assert isinstance(own, Schedule)
    assert updates_in(own, range(3, 20))
    assert own.steps == [3, 4, 5, 6, 7]
    assert not updates_in(own, range(8, 14))
    assert own.steps[5:] == [8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_short_schedules_every_density_is_sampled(name):
    densities = PUBLISHED[name].resolve(5000).densities
    assert sampled_densities(PUBLISHED[name].resolve(5000)) == sorted(set(densities))


@pytest.mark.parametrize("total", [40_000, 400_000])
@pytest.mark.parametrize("cycles", [1, 3])
def test_of_long_schedules_the_ends_of_phases_and_some_between_are_sampled(total, cycles):
    schedule = EstDgm(Phase(0.75, 0.5, 0.15), Phase(0.3, 0.25, 0.35), Phase(0.2, 0.125, 0.5), cycles, update_every=5)
    schedule = schedule.resolve(total)
    found = sampled_densities(schedule)
    assert found == sorted(set(found) & set(schedule.densities))
    assert len(found) <= 1000 + 2 * 3 * cycles
    for segment in schedule.segments:
        assert {schedule(segment.first).density, schedule(segment.last - 1).density} <= set(found)
    for factor in (0.3, 1.0, 10.0):  # by how much a layer is denser than the whole
        every, sampled = [{bucket_of(min(1.0, factor * x)) for x in some} for some in (schedule.densities, found)]
        assert sampled == every


@pytest.mark.parametrize(
    ("changes", "until", "progress"),
    [(((0, 0.5), (8, 0.2)), None, [0.0, 0.5, 1.0, 1.0]), (((0, 0.5), (8, 0.2)), 5, [0.0, 0.8, 1.0, 1.0])],
)
def test_the_drop_fraction_is_annealed_to_the_last_change_or_a_given_step(changes, until, progress):
    schedule = SteppedSchedule(10, (Segment("only", 0, 0, 10),), changes, 1, until)
    assert [schedule.drop_progress(step) for step in (0, 4, 8, 9)] == progress
    assert SteppedSchedule(10, schedule.segments, changes[:1], 1).drop_progress(0) == 1.0  # nothing is ever updated


@pytest.mark.parametrize(
    ("given", "total", "found"),
    [
        ((None, None), 100_000, (200, 8)),
        ((None, None), 1000, (40, 4)),
        ((None, None), 10, (1, 1)),
        ((50, None), 1000, (50, 5)),
        ((50, 7), 1000, (50, 7)),
    ],
)
def test_intervals_follow_the_length_of_the_run_where_none_are_given(given, total, found):
    assert intervals(*given, total) == found
