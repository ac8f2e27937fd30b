"""Learning rate of the recipes: warm-up, then a cosine over the whole run."""

from __future__ import annotations

import math

from lightning import LightningModule


def warmup_cosine(step: int, steps: int, warmup: float, floor: float = 0.1) -> float:
    """Factor on the learning rate: a linear rise for ``warmup * steps``, then half a cosine from 1 to ``floor``.

    >>> warmup_cosine(0, 100, 0.1), warmup_cosine(9, 100, 0.1), round(warmup_cosine(100, 100, 0.1), 6)
    (0.1, 1.0, 0.1)
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def run_steps(module: LightningModule) -> int:
    """Number of optimizer steps of the module's run.

    Raises:
        ValueError: The Trainer cannot tell it.
    """
    steps = module.trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            f"{type(module).__name__} needs a run of known length for its cosine, got {steps}; set max_steps"
        )
    return int(steps)
