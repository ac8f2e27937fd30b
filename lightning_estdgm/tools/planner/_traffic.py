"""Traffic of one GPU in a step, in bytes."""

from __future__ import annotations

from lightning_estdgm.tools.planner._layout import ShardLayout
from lightning_estdgm.tools.planner._planned_model import PlannedModel
from lightning_estdgm.tools.planner._setup import TrainingSetup


def traffic_bytes(model: PlannedModel, setup: TrainingSetup, strategy: str) -> dict[str, float]:
    """Return what one GPU hands to collectives in a step, in bytes, by kind; and what a ring then sends.

    "dense": without the method. "active units": DDP outside observation windows, with `compress_gradients`. "mean":
    over the steps between two updates, those observed included. FSDP2 sends the same with and without the method.
    A ring of W ranks sends (W - 1) / W of what is gathered or scattered, and twice that of what is all-reduced.
    """
    layout, each = ShardLayout.of(setup, strategy), setup.parameter_bytes
    ring = (layout.ranks - 1) / layout.ranks
    n = model.parameters / layout.tensor_parallel
    found: dict[str, float] = {}
    if layout.ranks == layout.tensor_parallel == 1:
        return found
    if strategy == "ddp":
        idle = sum(layer.weights - layer.active_weights for layer in model.masked)
        observed = setup.observe_steps / setup.update_every
        found["all-reduce, dense"] = n * each
        found["all-reduce, active units"] = (n - idle) * each
        found["all-reduce, mean"] = (n - (1.0 - observed) * idle) * each
        found["ring, dense"] = 2.0 * ring * found["all-reduce, dense"]
        found["ring, EST-DGM"] = 2.0 * ring * found["all-reduce, mean"]
        return found
    inner = sum(model.sharding_units) / layout.tensor_parallel
    found["all-gather"] = (n + inner) * each if layout.ranks > 1 else 0.0  # forward; again in the backward but the root
    found["reduce-scatter"] = n * each if layout.ranks > 1 else 0.0
    found["ring, dense"] = ring * (found["all-gather"] + found["reduce-scatter"])
    if layout.tensor_parallel > 1 and model.width is not None:
        activation = 4 if setup.precision == "32-true" else 2
        # Two products a block whose outputs are summed over the group, in the forward and in the backward.
        found["all-reduce of activations"] = 4.0 * len(model.sharding_units) * setup.tokens * model.width * activation
        around = (layout.tensor_parallel - 1) / layout.tensor_parallel
        found["ring, dense"] += 2.0 * around * found["all-reduce of activations"]
    found["ring, EST-DGM"] = found["ring, dense"]
    return found
