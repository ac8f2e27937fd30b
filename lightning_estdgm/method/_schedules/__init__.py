"""When the masks change and how dense they are: pure functions of the optimizer step.

A `ScheduleConfig` is what a user writes down (a frozen dataclass, independent of the run's length). Its `resolve`
turns it into a `Schedule` for a run of known length: `schedule(step) -> Plan`.
"""

from lightning_estdgm.method._schedules.drop_fraction import DropTo, StagedDrop
from lightning_estdgm.method._schedules.estdgm import WARMUP, EstDgm, Phase
from lightning_estdgm.method._schedules.protocol import Plan, Schedule, ScheduleConfig, Segment, SteppedSchedule
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
]
