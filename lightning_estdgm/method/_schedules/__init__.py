"""Schedules: the steps at which masks change and their densities, as pure functions of the optimizer step.

A `ScheduleConfig` holds a user's settings (a frozen dataclass, independent of the run's length). Its `resolve` returns
the `Schedule` of a run of known length: `schedule(step) -> Plan`. Which units a change drops and grows is not decided
here.
"""

from lightning_estdgm.method._schedules.drop_fraction import DropTo, StagedDrop
from lightning_estdgm.method._schedules.estdgm import WARMUP, EstDgm, Phase
from lightning_estdgm.method._schedules.protocol import (
    Plan,
    Schedule,
    ScheduleConfig,
    Segment,
    SteppedSchedule,
    sampled_densities,
    updates_in,
)
from lightning_estdgm.method._schedules.published import AlternatingDensity, ConstantDensity, CubicDensity

__all__ = [
    "WARMUP",
    "AlternatingDensity",
    "ConstantDensity",
    "CubicDensity",
    "DropTo",
    "EstDgm",
    "Phase",
    "Plan",
    "Schedule",
    "ScheduleConfig",
    "Segment",
    "StagedDrop",
    "SteppedSchedule",
    "sampled_densities",
    "updates_in",
]
