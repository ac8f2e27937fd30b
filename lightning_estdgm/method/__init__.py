"""The method's mathematics: tensors in, tensors out; no state, no Lightning.

What is public here is for schedules, scores, patterns and redistributions of one's own; see docs/methods.md.
"""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.method.backward_set import BackwardSet as BackwardSet
    from lightning_estdgm.method.patterns import FanIn as FanIn
    from lightning_estdgm.method.patterns import NofM as NofM
    from lightning_estdgm.method.patterns import Pattern as Pattern
    from lightning_estdgm.method.redistribution import Budget as Budget
    from lightning_estdgm.method.redistribution import Scored as Scored
    from lightning_estdgm.method.schedules import AlternatingDensity as AlternatingDensity
    from lightning_estdgm.method.schedules import ConstantDensity as ConstantDensity
    from lightning_estdgm.method.schedules import CubicDensity as CubicDensity
    from lightning_estdgm.method.schedules import DropTo as DropTo
    from lightning_estdgm.method.schedules import Schedule as Schedule
    from lightning_estdgm.method.schedules import ScheduleConfig as ScheduleConfig
    from lightning_estdgm.method.schedules import Segment as Segment
    from lightning_estdgm.method.schedules import StagedDrop as StagedDrop
    from lightning_estdgm.method.schedules import SteppedSchedule as SteppedSchedule
    from lightning_estdgm.method.scores import Evidence as Evidence
    from lightning_estdgm.method.scores import WeightAndGradient as WeightAndGradient
else:
    _SCHEDULES = (
        *("AlternatingDensity", "ConstantDensity", "CubicDensity", "DropTo", "Schedule", "ScheduleConfig"),
        *("Segment", "StagedDrop", "SteppedSchedule"),
    )
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "BackwardSet": "lightning_estdgm.method.backward_set",
            "Budget": "lightning_estdgm.method.redistribution",
            "Evidence": "lightning_estdgm.method.scores",
            "FanIn": "lightning_estdgm.method.patterns",
            "NofM": "lightning_estdgm.method.patterns",
            "Pattern": "lightning_estdgm.method.patterns",
            "Scored": "lightning_estdgm.method.redistribution",
            "WeightAndGradient": "lightning_estdgm.method.scores",
            **dict.fromkeys(_SCHEDULES, "lightning_estdgm.method.schedules"),
        },
    )
