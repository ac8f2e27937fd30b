"""Settings of the training benchmark: its schedule, and layers that follow memory and time."""

import pytest

from helpers.bench_cases import PHASES, TINY
from lightning_estdgm.tools.bench.train._choice import TrainChoice, choose
from lightning_estdgm.tools.bench.train._train_config import TrainConfig, compressed_schedule, fitting_layers
from lightning_estdgm.tools.bench.train._workloads import GptWorkload, ResNetWorkload


def test_the_compressed_schedule_has_the_default_phases_densities_and_a_window_before_each_change():
    config = TrainConfig(device="cpu")
    schedule = compressed_schedule(config).resolve(3 * config.densities * config.interval)
    plans = [schedule(step) for step in range(schedule.total_steps)]
    assert [p.density for p in plans[:: config.interval]] == pytest.approx(
        [0.7, 0.65, 0.6, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1]
    )
    assert [p.phase for p in plans[:: config.interval]] == [name for name in PHASES for _ in range(3)]
    for index, plan in enumerate(plans[: -config.interval]):
        assert plan.observe == (index % config.interval >= config.interval - config.observe_steps)
    assert not any(plan.observe for plan in plans[-config.interval :])


def test_layers_follow_memory_and_time():
    assert fitting_layers(2048, 8192, 80e9, 10.0, 4e14) == (24, "as published models")
    layers, reason = fitting_layers(2048, 8192, 20e9, 10.0, 4e14)
    assert reason == "memory"
    assert layers * (12 * 2048**2 * 22 + 8192 * 2048 * 68) <= 0.8 * 20e9
    assert fitting_layers(1024, 1024, 8e9, 1.5, 1e11) == (1, "time")
    assert fitting_layers(4096, 1024, 2e9, 100.0, 1e11)[0] == 0
    said = []
    settings = {"context": 16, "batch": 2, "layers": 3}
    found = choose(TrainChoice(widths=(64, 128), **settings), TINY, said.append)
    assert found == [GptWorkload(64, 3, 16, 2), GptWorkload(128, 3, 16, 2), ResNetWorkload(224, 2)]
    assert "3 layers of 12 (as asked for)" in said[0]
