"""Work of the masks on one GPU beyond the products: bytes moved in its memory, bytes sent."""

from __future__ import annotations

from lightning_estdgm.method._masks import FEW_ROWS, BlockSize, sides
from lightning_estdgm.tools.planner._layout import ShardLayout
from lightning_estdgm.tools.planner._planned_model import PlannedModel
from lightning_estdgm.tools.planner._setup import TrainingSetup

_WORD_BYTES = 8
_PASS_BYTES = 256 * _WORD_BYTES  # counts of one pass of `distributed._top_k`
_PASSES = 4  # over float32 scores; more where scores are equal

# What the operators of an observed step, and of an update, read and write in bytes: for each weight that the GPU holds,
# and for each unit; of an update with finding the units it has grown, without clearing optimizer state. For float32;
# counted at torch's dispatcher in the runs that check them.
_BYTES = {
    ("whole", "block"): ((16, 28), (29, 214)),
    ("whole", "few rows"): ((27, 28), (52, 214)),
    ("whole", "weight"): ((36, 0), (196, 0)),
    ("part", "block"): ((28, 204), (63, 771)),
    ("part", "weight"): ((44, 0), (1604, 0)),
}


def update_cost(model: PlannedModel, setup: TrainingSetup, strategy: str) -> dict[str, float]:
    """Return what masks cost one GPU beyond the products: bytes that operators move in its memory, and bytes it sends.

    "every step": gradients masked before the step, weights after it; where something changes gradients in between, as
    clipping does, these are masked twice. "more in an observed step" and "in an update" come on top; "mean a step" is
    over the steps between two updates. "against the optimizer": that mean over what a fused optimizer moves.
    "FLOPs of observing": whole weight gradients in observed steps, against all FLOPs of a dense step.

    What is sent is handed to collectives: of blocks, the squares of units; of single weights, 256 counts a pass.
    """
    layout, each = ShardLayout.of(setup, strategy), setup.parameter_bytes
    holding = "part" if layout.is_sharded else "whole"
    around = (layout.ranks > 1) + (layout.tensor_parallel > 1) if layout.is_sharded else 0  # groups to reduce over
    states = setup.optimizer_states
    every = observed = update = sent_observed = sent_update = idle = 0.0
    for layer in model.masked:
        grain = _grain(holding, layer.block_size)
        here, units = layer.weights / layout.shards, layer.units / layout.shards
        fill = here * 2 * each + (here if layout.is_sharded else units)  # read, write, and the mask
        every += 2 * fill
        in_observed, in_update = (weight * here + unit * units for weight, unit in _BYTES[holding, grain])
        observed += in_observed
        update += in_update + states * fill
        words = 2.0 if grain == "weight" else 1.0 + layer.units
        sent_observed += around * _WORD_BYTES * words
        ranked = 4 * _WORD_BYTES + 2 * _PASSES * layer.parts * _PASS_BYTES
        sent_update += around * (ranked if grain == "weight" else 2 * _WORD_BYTES * layer.units)
        idle += layer.weights - layer.active_weights if layer.density < 1.0 else 0.0
    if setup.gpus > 1:
        compared = sum(layer.block_size != 1 or not layout.is_sharded for layer in model.masked)
        sent_update += _WORD_BYTES * (2 + compared) * setup.gpus
    period = setup.update_every
    mean = every + (setup.observe_steps * observed + update) / period
    optimizer = (2 * states + 3) * each * model.parameters / layout.shards
    return {
        "every step": every,
        "more in an observed step": observed,
        "in an update": update,
        "mean a step": mean,
        "against the optimizer": mean / optimizer,
        "sent in an observed step": sent_observed,
        "sent in an update": sent_update,
        "sent, mean a step": (setup.observe_steps * sent_observed + sent_update) / period,
        "FLOPs of observing": setup.observe_steps / period * idle / (3.0 * model.parameters),
    }


def _grain(holding: str, block_size: BlockSize) -> str:
    if block_size == 1:
        return "weight"
    return "few rows" if holding == "whole" and sides(block_size)[0] <= FEW_ROWS else "block"
