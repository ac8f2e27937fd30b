"""A training script as a user writes one, for the ways to start it: ``python train.py ddp OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from helpers import distributed_jobs as jobs  # noqa: F401 - puts `models` on the path
from helpers.models import MLP, SCHEDULE, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig


def train(strategy: str) -> dict[str, object]:
    """Fit with two ranks, and return what the process that called this then knows."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module, callback = MLP(), DGMCallback(DGMConfig(schedule=SCHEDULE, backend="cpu"))
    trainer = make_trainer(callback, devices=2, strategy=strategy, max_epochs=1)
    trainer.fit(module, MLP.batches(20))
    return {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "weights": module.state_dict(),
        "masks": callback.masks(),
        "decisions": [(d.name, d.density, d.backend, d.why) for d in callback.decisions()],
        "numbers": (callback.phase, callback.density, callback.flops_ratio, callback.schedule.total_steps),
        "state": callback.state_dict(),
    }


if __name__ == "__main__":
    result = train(sys.argv[1])
    torch.save(result, Path(sys.argv[2]) / f"{result['rank']}.pt")
