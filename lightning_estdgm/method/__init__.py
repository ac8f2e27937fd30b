"""The method's mathematics: tensors in, tensors out; no state, no Lightning.

What is public here is for schedules, scores, patterns and redistributions of one's own; see docs/methods/published.md.
"""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.method._backward_set import BackwardSet as BackwardSet
    from lightning_estdgm.method._patterns import FanIn as FanIn
    from lightning_estdgm.method._patterns import NofM as NofM
    from lightning_estdgm.method._patterns import Pattern as Pattern
    from lightning_estdgm.method._redistribution import Budget as Budget
    from lightning_estdgm.method._redistribution import Scored as Scored
    from lightning_estdgm.method._schedules import AlternatingDensity as AlternatingDensity
    from lightning_estdgm.method._schedules import ConstantDensity as ConstantDensity
    from lightning_estdgm.method._schedules import CubicDensity as CubicDensity
    from lightning_estdgm.method._schedules import DropTo as DropTo
    from lightning_estdgm.method._schedules import Schedule as Schedule
    from lightning_estdgm.method._schedules import ScheduleConfig as ScheduleConfig
    from lightning_estdgm.method._schedules import Segment as Segment
    from lightning_estdgm.method._schedules import StagedDrop as StagedDrop
    from lightning_estdgm.method._schedules import SteppedSchedule as SteppedSchedule
    from lightning_estdgm.method._scores import Evidence as Evidence
    from lightning_estdgm.method._scores import WeightAndGradient as WeightAndGradient
else:
    _SCHEDULES = (
        *("AlternatingDensity", "ConstantDensity", "CubicDensity", "DropTo", "Schedule", "ScheduleConfig"),
        *("Segment", "StagedDrop", "SteppedSchedule"),
    )
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "BackwardSet": "lightning_estdgm.method._backward_set",
            "Budget": "lightning_estdgm.method._redistribution",
            "Evidence": "lightning_estdgm.method._scores",
            "FanIn": "lightning_estdgm.method._patterns",
            "NofM": "lightning_estdgm.method._patterns",
            "Pattern": "lightning_estdgm.method._patterns",
            "Scored": "lightning_estdgm.method._redistribution",
            "WeightAndGradient": "lightning_estdgm.method._scores",
            **dict.fromkeys(_SCHEDULES, "lightning_estdgm.method._schedules"),
        },
    )
