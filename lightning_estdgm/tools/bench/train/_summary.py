"""Dense and sparse runs compared: speed and joules by phase, and over a whole run; pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lightning_estdgm.method._schedules import EstDgm, Schedule
from lightning_estdgm.tools.bench.train._train_config import NOMINAL_STEPS, SETTLE_STEPS
from lightning_estdgm.tools.bench.train._whole import DENSE, PhaseTimes, Step, phase_times, plain_seconds, whole_run


def summarise(
    dense: Sequence[Sequence[Step]],
    sparse: Sequence[Sequence[Step]],
    items: int,
    energy: dict[str, Any] | None,
    schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Compare one more dense runs than sparse ones that lay between them.

    Args:
        dense: steps of the dense runs.
        sparse: steps of the sparse runs.
        items: number of tokens or images a step.
        energy: "watts" by phase and for "dense", and "sources"; None without a counter.
        schedule: schedule of the whole run; by default `NOMINAL_STEPS` of the default schedule.

    Returns:
        "dense", "phases" and "whole", each with seconds, ``items_per_s`` and joules; ``speedup`` is dense seconds over
        sparse ones for the same steps. "by_round" repeats the ratios for each sparse run and its two neighbours.
        "one_off" is the time that the first of its kind took beyond others in the first sparse run (choosing backends,
        tuning, compiling), by kind; it is in no ratio.
    """
    schedule = schedule or EstDgm().resolve(NOMINAL_STEPS)
    watts = {} if energy is None else energy["watts"]
    dense_s = plain_seconds(step for run in dense for step in run)
    times = phase_times([step for run in sparse for step in run])
    phases = whole_run(times, schedule)
    for name, phase in phases.items():
        phase |= {
            "step_s": phase["seconds"] / phase["steps"],
            "items_per_s": items * phase["steps"] / phase["seconds"],
            "speedup": dense_s * phase["steps"] / phase["seconds"],
            "plain_speedup": dense_s * phase["steps"] / phase["plain_s"],
            "watts": watts.get(name),
            "joules": _times(watts.get(name), phase["seconds"]),
            "measured": {
                "plain_s": dict(times[name].plain_s),
                "observing_s": dict(times[name].observing_s),
                "update_s": times[name].update_s,
            },
        }
    seconds = sum(phase["seconds"] for phase in phases.values())
    joules = [phase["joules"] for phase in phases.values()]
    dense_joules = _times(watts.get(DENSE), dense_s * schedule.total_steps)
    whole_joules = None if None in joules else sum(joules)
    return {
        "dense": {"step_s": dense_s, "items_per_s": items / dense_s, "watts": watts.get(DENSE)},
        "phases": phases,
        "whole": {
            "steps": schedule.total_steps,
            "seconds": seconds,
            "dense_seconds": dense_s * schedule.total_steps,
            "items_per_s": items * schedule.total_steps / seconds,
            "speedup": dense_s * schedule.total_steps / seconds,
            "joules": whole_joules,
            "dense_joules": dense_joules,
            "joules_ratio": dense_joules / whole_joules if dense_joules and whole_joules else None,
        },
        "by_round": [
            _ratios(before, run, after, schedule) for before, run, after in zip(dense, sparse, dense[1:], strict=False)
        ],
        "one_off": _one_off(sparse[0], times),
        "energy": "no counter" if energy is None else energy["sources"],
    }


def _ratios(before: Sequence[Step], run: Sequence[Step], after: Sequence[Step], schedule: Schedule) -> dict[str, float]:
    dense_s = statistics.fmean((plain_seconds(before), plain_seconds(after)))
    phases = whole_run(phase_times(run), schedule)
    ratios = {name: dense_s * phase["steps"] / phase["seconds"] for name, phase in phases.items()}
    return {
        "dense_step_s": dense_s,
        **ratios,
        "whole": dense_s * schedule.total_steps / sum(p["seconds"] for p in phases.values()),
    }


def _one_off(run: Sequence[Step], times: dict[str, PhaseTimes]) -> dict[str, float]:
    found = {"run_s": 0.0, "mask_s": 0.0, "window_s": 0.0}
    for index, step in enumerate(run):
        usual_s = dict(times[step.phase].plain_s)[step.density]
        if not step.counts:
            found["run_s" if index < SETTLE_STEPS else "mask_s"] += max(0.0, step.seconds - usual_s)
        elif step.observed and not run[index - 1].observed:
            usual_s += dict(times[step.phase].observing_s).get(step.density, 0.0)
            found["window_s"] += max(0.0, step.seconds - usual_s)
    return found


def _times(watts: float | None, seconds: float) -> float | None:
    return None if watts is None else watts * seconds
