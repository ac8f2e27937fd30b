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

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._forward_probe import ForwardProbe
from lightning_estdgm.modules._forward_watch import probe_forward
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._tasks import task_named
from lightning_estdgm.tools.study._variants import VARIANTS, StudyGPT


def train(run: StudyRun) -> dict[str, Any]:
    """Train a run with a real Trainer, and measure its quality and its cost: the result of `fit`."""
    return fit(run)[1]


def fit(run: StudyRun) -> tuple[LightningModule, dict[str, Any]]:
    """Train a run with a real Trainer, and measure its quality and its cost.

    Returns:
        The trained model, and
        ``val_loss`` and ``val_accuracy`` (NaN where a task has none) after the last step, ``test_accuracy`` of tasks
        with a part for testing; ``flops_ratio``: training FLOPs of linear and convolution layers that the masks ask
        for, over those of the task's own model in as many dense steps; ``flops``: these FLOPs themselves;
        ``served_weights``: number of parameters that are not 0; ``final_density`` of the masked weights; ``seconds`` of
        training; ``joules`` and how they are known; ``status``: ``"ok"`` or ``"diverged"``.

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
        metrics = _evaluate(model, run)
        flops_ratio, flops = _flops(run, model, callback)
    loss = metrics.get("val/loss", math.nan)
    energy = monitor.summary()
    return model, {
        "status": status if math.isfinite(loss) else "diverged",
        "val_loss": loss,
        "val_accuracy": metrics.get("val/accuracy", math.nan),
        "test_accuracy": metrics.get("test/accuracy", math.nan),
        "flops_ratio": flops_ratio,
        "flops": flops,
        "served_weights": sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        "final_density": callback.density if callback else 1.0,
        "seconds": clock.seconds,
        "joules": energy.get("train_joules", math.nan),
        "energy_method": energy.get("method", ""),
    }


def _flops(run: StudyRun, model: LightningModule, callback: DGMCallback | None) -> tuple[float, float]:
    """Return the run's training FLOPs over those of the task's own model, dense, and in absolute numbers."""
    task = task_named(run.task)
    data = task.data(run.seed)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    own = step_flops(run.model(), batch)
    whole = step_flops(task.model(run.lr), batch) if run.settings_of("model") else own
    ratio = callback.flops_ratio if callback else 1.0
    if isinstance(model, StudyGPT):
        ratio += model.taught_steps / run.steps * model.teacher_density / 3.0
    ratio *= own / whole
    return ratio, ratio * whole * run.steps


def step_flops(model: LightningModule, batch: Any) -> float:
    """Return the training FLOPs of a dense step in linear and convolution layers, as `FlopCounter` counts them.

    Args:
        model: model that no Trainer has; it is evaluating afterwards.
        batch: batch of its training data.

    """
    layers = find_candidates(model)
    probes = [ForwardProbe(layer) for layer in layers]
    for layer, probe in zip(layers, probes, strict=True):
        probe_forward(layer.module, probe)
    without_trainer(model)
    with torch.no_grad():
        model.training_step(batch, 0)
    return sum(6.0 * layer.position_weights * probe.positions for layer, probe in zip(layers, probes, strict=True))


def without_trainer(model: LightningModule) -> None:
    """Let a model's steps be called by hand: it evaluates, and logs nothing."""
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model.eval()


class _Clock(Callback):
    """Seconds from the first training step to the last."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = time.perf_counter() - self._began


def _evaluate(model: LightningModule, run: StudyRun) -> dict[str, float]:
    task, trainer = task_named(run.task), Trainer(**QUIET_TRAINER, logger=False)
    parts = [trainer.validate, *([trainer.test] if task.is_tested else [])]
    return {k: v for part in parts for k, v in part(model, datamodule=task.data(run.seed), verbose=False)[0].items()}
