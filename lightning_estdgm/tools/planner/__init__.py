"""``estdgm plan``: what each GPU would hold and send."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.tools.planner.gpt_sizes import gpt as gpt
    from lightning_estdgm.tools.planner.mask_work import update_cost as update_cost
    from lightning_estdgm.tools.planner.memory import memory_bytes as memory_bytes
    from lightning_estdgm.tools.planner.model_plan import plan_model as plan_model
    from lightning_estdgm.tools.planner.planned_model import inspect_model as inspect_model
    from lightning_estdgm.tools.planner.planned_model import load_model as load_model
    from lightning_estdgm.tools.planner.scaling import scaling_tables as scaling_tables
    from lightning_estdgm.tools.planner.setup import STRATEGIES as STRATEGIES
    from lightning_estdgm.tools.planner.setup import TrainingSetup as TrainingSetup
    from lightning_estdgm.tools.planner.tables import plan_tables as plan_tables
    from lightning_estdgm.tools.planner.traffic import traffic_bytes as traffic_bytes
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "STRATEGIES": "lightning_estdgm.tools.planner.setup",
            "TrainingSetup": "lightning_estdgm.tools.planner.setup",
            "gpt": "lightning_estdgm.tools.planner.gpt_sizes",
            "inspect_model": "lightning_estdgm.tools.planner.planned_model",
            "load_model": "lightning_estdgm.tools.planner.planned_model",
            "memory_bytes": "lightning_estdgm.tools.planner.memory",
            "plan_model": "lightning_estdgm.tools.planner.model_plan",
            "plan_tables": "lightning_estdgm.tools.planner.tables",
            "scaling_tables": "lightning_estdgm.tools.planner.scaling",
            "traffic_bytes": "lightning_estdgm.tools.planner.traffic",
            "update_cost": "lightning_estdgm.tools.planner.mask_work",
        },
    )
