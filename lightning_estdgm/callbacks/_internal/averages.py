"""Averages of weights that Lightning's callbacks keep: zero where the model is."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel

from lightning_estdgm.engine._controller import DGMController


def mask_averages_(trainer: pl.Trainer, controller: DGMController) -> None:
    """Keep inactive weights zero in the averages of Lightning's callbacks; they offer no hook to do it by."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            average = callback._average_model
            if average is not None:
                controller.mask_copy_(average.module if isinstance(average, AveragedModel) else average)
