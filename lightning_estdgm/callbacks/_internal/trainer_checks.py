"""Checks of a Trainer's settings for `DGMCallback`, and the factor that its gradients carry."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState


def check_trainer(trainer: object) -> None:
    """Refuse the Trainer of another package, whose callbacks, loops and strategies are other classes.

    Raises:
        TypeError: It is no ``lightning.pytorch.Trainer``.

    """
    if not isinstance(trainer, pl.Trainer):
        kind = type(trainer)
        raise TypeError(
            f"DGMCallback: got a Trainer of {kind.__module__}, expected lightning.pytorch.Trainer: write `import "
            "lightning.pytorch as pl` in place of `import pytorch_lightning as pl`; both packages have the same names, "
            "and neither knows the other's classes"
        )


def check_checkpoint_io(trainer: pl.Trainer) -> None:
    """Let a CheckpointIO refuse the strategy, as `SparseCheckpointIO` does; Lightning does not pass it the strategy."""
    plugin = trainer.strategy.checkpoint_io
    for part in (plugin, getattr(plugin, "checkpoint_io", None)):  # an AsyncCheckpointIO wraps another
        if (check := getattr(part, "check_strategy", None)) is not None:
            check(trainer.strategy)


def check_other_maskers(trainer: pl.Trainer) -> None:
    """Refuse Lightning's `ModelPruning`, which replaces the parameters that are masked: neither mask would hold."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise ValueError(
            "ModelPruning prunes the weights that DGMCallback masks, and puts other parameters in their place: leave "
            "one out, or give ModelPruning's part to the schedule (DGMConfig(schedule=CubicDensity(...)) prunes "
            "gradually by magnitude)"
        )


def grad_scale(trainer: pl.Trainer) -> float:
    """Return the factor of an fp16 GradScaler; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


def check_ddp(trainer: pl.Trainer) -> None:
    """Refuse settings of DDP that would give ranks different masks, or let torch fail without a reason."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    if isinstance(strategy._ddp_comm_state, PostLocalSGDState):
        raise ValueError(
            "expected a DDP hook that averages gradients over all ranks in every step, got post-local SGD: its ranks "
            "train apart between averagings, so each would choose other masks"
        )
    together = trainer.accumulate_grad_batches
    if strategy._ddp_kwargs.get("static_graph") and together > 1 and trainer.world_size > 1:
        raise ValueError(
            f"static_graph=True does not work with accumulate_grad_batches={together}: torch's DDP stops with an "
            "internal error in the first micro-batch. Leave one of the two out"
        )
