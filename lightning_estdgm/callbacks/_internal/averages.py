"""Masking of the weight averages that Lightning's callbacks keep."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel

from lightning_estdgm.engine._controller import DGMController


def mask_averages_(trainer: pl.Trainer, controller: DGMController) -> None:
    """Zero inactive weights in the averages of Lightning's callbacks, which offer no hook for it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            average = callback._average_model
            if average is not None:
                whole = average.module if isinstance(average, AveragedModel) else average
                controller.mask_copy_(whole, as_stored=True)
