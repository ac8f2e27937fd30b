"""Properties of all schedules."""

import itertools
import pickle

import pytest

from lightning_estdgm.method.schedules import (
    AlternatingDensity,
    ConstantDensity,
    CubicDensity,
    Schedule,
    ScheduleConfig,
)

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
