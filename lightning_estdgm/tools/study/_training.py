"""Training and measuring a run of the study."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._tasks import task_named
from lightning_estdgm.tools.study._variants import VARIANTS, StudyGPT


def train(run: StudyRun) -> dict[str, Any]:
    """Train a run with a real Trainer, and measure its quality and its cost.

    Returns:
        ``val_loss`` and ``val_accuracy`` (NaN where a task has none) after the last step; ``flops_ratio``: training
        FLOPs of linear and convolution layers that the masks ask for, over those of the task's own model in as many
        dense steps;
        ``final_density`` of the masked weights; ``seconds`` of training; ``joules`` and how they are known; ``status``:
        ``"ok"`` or ``"diverged"``.

    """
    torch.manual_seed(run.seed)
    model, callback = run.model(), run.callback()
    monitor, clock = EnergyMonitor(), _Clock()
    variants = [VARIANTS[name](**arguments) for name, arguments in run.settings_of("with").items()]
    callbacks: list[Callback] = [*(variant for variant in variants if variant.is_first)]
    callbacks += [callback] if callback else []
    callbacks += [*(variant for variant in variants if not variant.is_first), monitor, clock]
    status = "ok"
    with (
        quiet_lightning(),
        TemporaryDirectory() as folder,  # of the monitor's energy.json
        contextlib.redirect_stdout(io.StringIO()),  # the decisions of each run
    ):
        warnings.filterwarnings("ignore", ".*number of training batches.*smaller than the logging interval")
        trainer = Trainer(
            **QUIET_TRAINER,
            logger=False,
            max_steps=run.steps,
            max_epochs=-1,
            default_root_dir=folder,
            callbacks=callbacks,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(model, datamodule=task_named(run.task).data(run.seed))
        except ValueError as error:
            if "diverged" not in str(error):
                raise
            status = "diverged"
        metrics = _validate(model, run)
    loss = metrics.get("val/loss", math.nan)
    energy = monitor.summary()
    return {
        "status": status if math.isfinite(loss) else "diverged",
        "val_loss": loss,
        "val_accuracy": metrics.get("val/accuracy", math.nan),
        "flops_ratio": _flops_ratio(run, model, callback),
        "final_density": callback.density if callback else 1.0,
        "seconds": clock.seconds,
        "joules": energy.get("train_joules", math.nan),
        "energy_method": energy.get("method", ""),
    }


def _flops_ratio(run: StudyRun, model: LightningModule, callback: DGMCallback | None) -> float:
    own = callback.flops_ratio if callback else 1.0
    if isinstance(model, StudyGPT):  # every linear layer of it sees every token, so its weights tell the FLOPs
        own += model.taught_steps / run.steps * model.teacher_density / 3.0
        own *= _linear_weights(model) / _linear_weights(task_named(run.task).model(run.lr))
    return own


def _linear_weights(model: LightningModule) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


class _Clock(Callback):
    """Seconds from the first training step to the last."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = time.perf_counter() - self._began


def _validate(model: LightningModule, run: StudyRun) -> dict[str, float]:
    trainer = Trainer(**QUIET_TRAINER, logger=False)
    (metrics,) = trainer.validate(model, datamodule=task_named(run.task).data(run.seed), verbose=False)
    return dict(metrics)
