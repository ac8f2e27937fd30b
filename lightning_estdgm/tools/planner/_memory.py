"""Memory of one GPU, in bytes."""

from __future__ import annotations

from lightning_estdgm.method._masks import mask_shape
from lightning_estdgm.tools.planner._layout import INDEX_BYTES, ShardLayout
from lightning_estdgm.tools.planner._planned_model import PlannedLayer, PlannedModel
from lightning_estdgm.tools.planner._setup import TrainingSetup

ADDED = ("masks", "block index lists", "observation window")
"""Kinds of memory that the method adds."""

SCORE_BYTES = 4
"""Bytes of a score: float32, also for low-precision weights."""


def memory_bytes(model: PlannedModel, setup: TrainingSetup, strategy: str) -> dict[str, float]:
    """Return what one GPU holds, in bytes, by kind: what training needs without the method, then what it adds.

    Activations are not in it. "gathered" is what is whole at one time under FSDP2: the root's weights and gradients,
    two units' weights (the next is fetched while one computes) and one unit's gradients.
    "observation window" exists only in the steps observed.
    """
    layout, each = ShardLayout.of(setup, strategy), setup.parameter_bytes
    share = each / layout.shards
    n = model.parameters
    largest = max(model.sharding_units, default=0)
    held: dict[str, float] = {
        "weights": n * share,
        "gradients": n * share,
        "optimizer state": setup.optimizer_states * n * share,
        "DDP's buckets": 0.0,
        "gathered": 0.0,
    }
    if layout.ranks > 1 and strategy == "ddp":
        held["DDP's buckets"] = n * share
    elif layout.ranks > 1:
        held["gathered"] = (2 * model.root + 3 * largest) * each / layout.tensor_parallel
    held["masks"] = sum(_mask_bytes(layer, layout) for layer in model.masked)
    held["block index lists"] = float(sum(_topology_bytes(layer) for layer in model.masked))
    held["observation window"] = sum(
        SCORE_BYTES * (layer.weights / layout.shards + layer.units / _mask_shards(layer, layout))
        for layer in model.masked
    )
    return held


def dense_bytes(held: dict[str, float]) -> float:
    """Return what training needs without the method, of what `memory_bytes` has returned."""
    return sum(held[kind] for kind in held if kind not in ADDED)


def added_bytes(held: dict[str, float], *, in_window: bool = True) -> float:
    """Return what the method adds, of what `memory_bytes` has returned; in an observation window or between two."""
    return sum(held[kind] for kind in ADDED if in_window or kind != "observation window")


def _mask_shards(layer: PlannedLayer, layout: ShardLayout) -> int:
    """Masks of single weights are sharded as the weights are; those of blocks are whole on every rank."""
    return layout.shards if layer.block_size == 1 else 1


def _mask_bytes(layer: PlannedLayer, layout: ShardLayout) -> float:
    """Two bool tensors, active and ever active; blocks of a part of a weight also laid out by weights."""
    laid_out = layer.weights / layout.shards if layout.is_sharded and layer.block_size != 1 else 0.0
    return 2.0 * layer.units / _mask_shards(layer, layout) + laid_out


def _topology_bytes(layer: PlannedLayer) -> int:
    """Two lists with room for every block, and where each row and column starts."""
    if layer.block_size in (0, 1) or not layer.has_operator:
        return 0
    rows, columns = mask_shape(layer.shape, layer.block_size)
    return INDEX_BYTES * (2 * rows * columns + rows + columns + 2)
