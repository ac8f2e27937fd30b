"""What the native backend did with weights: how often it laid them out, and how much it keeps of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_estdgm import DGMCallback, DGMConfig, Phase, Units
from lightning_estdgm.config import EstDgm
from lightning_estdgm.sparse.backends._protocol import get_backend
from lightning_estdgm.sparse.backends.native._build import library


def packings() -> int:
    """Return how often a weight was laid out so far; skip the test where nothing can be compiled."""
    loaded = library()
    if isinstance(loaded, str):
        pytest.skip(loaded)
    count: int = loaded.estdgm_packings()
    return count


def kept_bytes() -> int:
    """Return the bytes of all weights that are kept."""
    native: Any = get_backend("native")
    return sum(entry.nbytes for entry in native._kept._entries.values() if entry.kept is not None)


def fit_with_validation(model: pl.LightningModule, inputs: Tensor, folder: Path) -> None:
    """Train 18 steps of 8 inputs by blocks of 16, with a validation epoch of all inputs after every six."""
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=8)
    phase = Phase(0.3, 0.3, 4)
    schedule = EstDgm(phase, phase, Phase(0.2, 0.2, 10), update_every=4, observe_steps=1, freeze=0.5)
    config = DGMConfig(schedule=schedule, units=Units(size=16), backend="native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=18, val_check_interval=6, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[DGMCallback(config)],
        )  # fmt: skip
        trainer.fit(model, batches, batches)
