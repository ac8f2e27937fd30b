"""Dense and sparse runs of one workload in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.energy._energy_meter import EnergyMeter
from lightning_estdgm.tools.bench.train._clock import StepClock
from lightning_estdgm.tools.bench.train._counters import counters, measured_watts
from lightning_estdgm.tools.bench.train._single_run import dgm_config, fit
from lightning_estdgm.tools.bench.train._summary import summarise
from lightning_estdgm.tools.bench.train._train_config import SETTLE_STEPS, TrainConfig, compressed_schedule
from lightning_estdgm.tools.bench.train._whole import DENSE, Step
from lightning_estdgm.tools.bench.train._workloads import Workload


def measure_train(
    workload: Workload, config: TrainConfig, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train dense and by EST-DGM in turns (dense, sparse, dense, sparse, dense, ...), and compare their steps.

    Returns:
        All that `summarise` returns; with ``"decisions"``, what each layer ran on at the end, and the settings.
    """
    with contextlib.ExitStack() as stack:
        sources = counters()
        meter = stack.enter_context(EnergyMeter(sources, interval_s=0.1)) if sources else None
        dense: list[list[Step]] = []
        sparse: list[list[Step]] = []
        booked: dict[str, int] = {}
        decisions: list[dict[str, Any]] = []
        steps = SETTLE_STEPS + config.dense_steps + 1
        peaks = {DENSE: 0, "sparse": 0}
        for index in range(2 * config.rounds + 1):
            is_sparse = index % 2 == 1
            schedule = compressed_schedule(config) if is_sparse else None
            length = 3 * config.densities * config.interval if is_sparse else steps
            dgm = None if schedule is None else DGMCallback(dgm_config(workload, config, schedule))
            clock = StepClock(dgm, meter)
            say(f"{workload.name}, {config.mode}: run {index + 1} of {2 * config.rounds + 1}, {length} steps")
            peak = fit(workload, config, length, [clock, *([dgm] if dgm else [])])
            (sparse if is_sparse else dense).append(clock.steps())
            peaks["sparse" if is_sparse else DENSE] = max(peak, peaks["sparse" if is_sparse else DENSE])
            for label, count in clock.booked_steps.items():
                booked[label] = booked.get(label, 0) + count
            if dgm is not None:
                decisions = [asdict(decision) for decision in dgm.decisions()]
        energy = None if meter is None else measured_watts(meter, booked)
    result = summarise(dense, sparse, workload.items, energy)
    return {
        "workload": workload.describe(),
        "name": workload.name,
        "mode": config.mode,
        "settings": {**asdict(config), "precision": config.precision},
        **result,
        "peak_memory_bytes": peaks if config.device != "cpu" else None,
        "decisions": decisions,
    }
