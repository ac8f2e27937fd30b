"""Parameter groups and learning rates that the recipes' optimizers share."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_estdgm.recipes._rates import run_steps, warmup_cosine


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on matrices and kernels only, not on biases and norms."""
    return [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def with_cosine(module: LightningModule, optimizer: Optimizer, warmup: float, floor: float) -> dict[str, Any]:
    """An optimizer whose rate moves every step by `warmup_cosine`, as Lightning's ``configure_optimizers`` returns it.

    Raises:
        ValueError: The Trainer cannot tell the number of steps.
    """
    factor = partial(warmup_cosine, steps=run_steps(module), warmup=warmup, floor=floor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
