"""Plan of one model: what it costs a GPU under each way of sharding it; calculated, not measured.

Pure functions of sizes: `memory`, `storage`, `traffic` and `mask_work` hold the formulas. ``estdgm plan`` prints them,
docs/guides/scaling.md explains them, and tests/tools/planner checks them against small jobs of two processes.

Units: bytes a GPU, FLOPs a GPU; 1 GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_estdgm.tools.planner._mask_work import update_cost
from lightning_estdgm.tools.planner._memory import memory_bytes
from lightning_estdgm.tools.planner._planned_model import PlannedModel, inspect_model
from lightning_estdgm.tools.planner._setup import STRATEGIES, TrainingSetup
from lightning_estdgm.tools.planner._storage import storage_table
from lightning_estdgm.tools.planner._traffic import traffic_bytes


def plan_model(model: nn.Module, setup: TrainingSetup, strategies: Sequence[str] = STRATEGIES) -> dict[str, Any]:
    """Return all the numbers of one model under each strategy, in plain types.

    Raises:
        ValueError: on an unknown strategy, one that cannot be laid over so many GPUs, or what `inspect_model` refuses.

    """
    return {
        "format": "lightning_estdgm.plan",
        "version": 1,
        "calculated": True,
        "setup": asdict(setup),
        "storage": storage_table(inspect_model(model, setup), setup),
        "strategies": {
            strategy: _plan_one(inspect_model(model, setup, strategy), setup, strategy) for strategy in strategies
        },
    }


def _plan_one(model: PlannedModel, setup: TrainingSetup, strategy: str) -> dict[str, Any]:
    return {
        "parameters": model.parameters,
        "masked_weights": model.masked_weights,
        "density": sum(layer.active_weights for layer in model.masked) / model.masked_weights,
        "layers": [asdict(layer) | {"density": layer.density} for layer in model.layers],
        "memory_bytes": memory_bytes(model, setup, strategy),
        "traffic_bytes_per_step": traffic_bytes(model, setup, strategy),
        "mask_work": update_cost(model, setup, strategy),
    }
