"""Memory of one GPU by storage and schedule, and the largest GPT that fits into it; without activations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_estdgm.method._masks import mask_shape
from lightning_estdgm.method._schedules import ConstantDensity, ScheduleConfig
from lightning_estdgm.presets import est_dgm
from lightning_estdgm.tools.planner._gpt_sizes import GPT_SIZES, CountedGpt
from lightning_estdgm.tools.planner._layout import INDEX_BYTES, ShardLayout
from lightning_estdgm.tools.planner._memory import SCORE_BYTES, added_bytes, dense_bytes, memory_bytes
from lightning_estdgm.tools.planner._planned_model import PlannedModel, inspect_model
from lightning_estdgm.tools.planner._setup import TrainingSetup

GPU_BYTES = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9}
"""Memory of common GPUs."""

_STEPS = 10_000  # of a run whose densities are asked for
_MOST_BLOCKS = 2  # times the blocks of the published shape of a width


@dataclass(frozen=True)
class StoragePlan:
    """A storage and a schedule.

    Attributes:
        storage: "dense" or "packed", as in `DGMConfig`.
        schedule: name of the schedule, as in `presets.est_dgm`, or "constant".
        start: density at the first step.
        highest: highest density of the schedule.
        mean: mean density over the steps.
        end: density at the last step.

    """

    storage: str
    schedule: str
    start: float
    highest: float
    mean: float
    end: float

    @classmethod
    def of(cls, storage: str, name: str, schedule: ScheduleConfig) -> StoragePlan:
        """Return that of a schedule."""
        resolved = schedule.resolve(_STEPS)
        densities = [resolved(step).density for step in range(_STEPS)]
        return cls(storage, name, densities[0], max(densities), sum(densities) / _STEPS, densities[-1])

    def bytes_at(self, density: float, model: PlannedModel, setup: TrainingSetup) -> dict[str, float]:
        """Return what one GPU holds at a density, in bytes, by kind."""
        if self.storage == "dense":
            held = memory_bytes(model, setup, "ddp")
            return {"weights, gradients, optimizer state": dense_bytes(held), "masks, window": added_bytes(held)}
        return packed_bytes(model, setup, density)


def storage_plans(density: float) -> list[StoragePlan]:
    """Return dense storage, and packed storage by each schedule that ends at a density."""
    phases = ("sparse-to-denser", "low-density", "cycle")
    schedules = {name: est_dgm(density, phases=name).schedule for name in phases}  # type: ignore[arg-type]
    constant = ConstantDensity(density)
    return [
        StoragePlan.of("dense", "any", constant),
        StoragePlan.of("packed", "constant", constant),
        *(StoragePlan.of("packed", name, schedule) for name, schedule in schedules.items()),
    ]


def packed_bytes(model: PlannedModel, setup: TrainingSetup, density: float) -> dict[str, float]:
    """Return what one GPU holds with packed storage under DDP, in bytes, by kind.

    Parameters, gradients and optimizer state of active units alone. "masks, index lists, window" are two flags and, in
    observed steps, a sum of a unit, and three index entries of an active one. "one layer at a time" is the largest
    masked weight, whole: where a backend expands it for a product, and for the gradient of an observed step.
    """
    each = setup.parameter_bytes
    stored = model.parameters - model.masked_weights + density * model.masked_weights
    buckets = 1 if ShardLayout.of(setup, "ddp").ranks > 1 else 0
    lists = 0.0
    for layer in model.masked:
        lists += layer.units * (2 + SCORE_BYTES)
        rows, columns = mask_shape(layer.shape, layer.block_size)[:2]
        lists += INDEX_BYTES * (3 * density * layer.units + rows + columns + 2)
    return {
        "weights, gradients, optimizer state": stored * each * (2 + setup.optimizer_states + buckets),
        "masks, index lists, window": lists,
        "one layer at a time": float(max((layer.weights for layer in model.masked), default=0) * each),
    }


def storage_table(model: PlannedModel, setup: TrainingSetup) -> list[dict[str, Any]]:
    """Return for each storage and schedule its densities and the bytes of one GPU, at most and at the end.

    "against_dense" is the most over what training without the method holds.
    """
    dense = dense_bytes(memory_bytes(model, setup, "ddp"))
    rows = []
    for plan in storage_plans(setup.density):
        peak = plan.bytes_at(plan.highest, model, setup)
        largest = {name: largest_gpt(plan, setup, room) for name, room in GPU_BYTES.items()}
        rows.append(
            {
                "storage": plan.storage,
                "schedule": plan.schedule,
                "density": {"start": plan.start, "highest": plan.highest, "mean": plan.mean, "end": plan.end},
                "peak_bytes": peak,
                "against_dense": sum(peak.values()) / dense,
                "end_bytes": plan.bytes_at(plan.end, model, setup),
                "fits": {name: sum(peak.values()) <= room for name, room in GPU_BYTES.items()},
                "largest_gpt": largest,
            }
        )
    return rows


def largest_gpt(plan: StoragePlan, setup: TrainingSetup, room: float) -> int:
    """Return the parameters of the largest GPT, of a published width, whose training fits into `room` bytes; or 0.

    It has at most twice as many decoder blocks as the published shape of that width.
    """
    best = 0
    for layers, width in GPT_SIZES.values():
        one, two = (_gpt(blocks, width, setup) for blocks in (1, 2))
        first, second = (sum(plan.bytes_at(plan.highest, model, setup).values()) for model in (one, two))
        blocks = min(int((room - first) / (second - first)) + 1, _MOST_BLOCKS * layers) if room >= first else 0
        if blocks:
            best = max(best, one.parameters + (blocks - 1) * (two.parameters - one.parameters))
    return best


@functools.lru_cache(maxsize=64)
def _gpt(blocks: int, width: int, setup: TrainingSetup) -> PlannedModel:
    return inspect_model(CountedGpt.on_meta(blocks, width), setup)


def fits_words(row: Mapping[str, Any]) -> str:
    """Return the smallest of the GPUs that the model's training fits into, in words."""
    return next((name for name, fits in row["fits"].items() if fits), "none of these")
