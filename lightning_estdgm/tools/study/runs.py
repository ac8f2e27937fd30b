"""One training run of the study: what defines it, and how it is trained and measured."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.method.schedules import EstDgm, Phase
from lightning_estdgm.tools.study.tasks import task_named
from lightning_estdgm.tools.study.variants import VARIANTS, StudyGPT

__all__ = ["DENSE", "Run", "train"]

DENSE = "dense"

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Run:
    """What defines a run; two equal ones train the same network on the same batches.

    Attributes:
        task: name of a task.
        method: ``"dense"``, or a preset's name.
        lr: peak learning rate.
        seed: of initial weights, batches and masks.
        density: final density; 1 for dense.
        length: steps, as a multiple of the task's.
        settings: what differs from the preset: fields of `DGMConfig`; of `EstDgm` as ``"schedule.<field>"`` (a phase as
            ``[start, end, length]``); of the task's model as ``"model.<argument>"``; and arguments
            of `variants.VARIANTS` as ``"with.<name>"``. Plain types.

    """

    task: str
    method: str
    lr: float
    seed: int
    density: float = 1.0
    length: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.length * task_named(self.task).steps))

    @property
    def variant(self) -> str:
        """The settings in one line, sorted; empty where there are none."""
        return json.dumps(self.settings, sort_keys=True) if self.settings else ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the run in a table of text."""
        numbers = (f"{self.lr:g}", str(self.seed), f"{self.density:g}", f"{self.length:g}")
        return (self.task, self.method, *numbers, self.variant)

    def settings_of(self, part: str) -> dict[str, Any]:
        """Return the settings named ``<part>.<name>`` by that name; those without a part for an empty one."""
        split = ((name.rpartition("."), value) for name, value in self.settings.items())
        return {name: value for (prefix, _, name), value in split if prefix == part}

    def model(self) -> LightningModule:
        """Return the model with its first weights, from the global random state."""
        return task_named(self.task).model(self.lr, **self.settings_of("model"))

    def callback(self) -> DGMCallback | None:
        """Return the callback that makes it sparse; ``None`` for dense."""
        if self.method == DENSE:
            return None
        overrides, schedule = self.settings_of(""), self.settings_of("schedule")
        if schedule:
            phases: dict[str, Any] = {
                k: Phase(*value) if isinstance(value, list) else value for k, value in schedule.items()
            }
            overrides["schedule"] = EstDgm(**phases)
        return DGMCallback.from_preset(self.method, density=self.density, seed=self.seed, **_nested(overrides))


_PLACES = {
    "block_size": ("units", "size"),
    "distribution": ("units", "distribution"),
    "step_exponent": ("step_size", "exponent"),
    "scale_init": ("step_size", "scale_initial_weights"),
    "exclude": ("selection", "exclude"),
    **{name: ("update_rule", name) for name in ("keep", "grow", "gamma", "drop_fraction")},
}
"""Settings by the short names that the tables of the study hold, and their places in `DGMConfig`."""

_PHASES = {"lean": "low-density", "rising": "sparse-to-denser"}
"""Schedules by the short names that the tables of the study hold, and their names in `presets.est_dgm`."""


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by short names as overrides of a preset."""
    overrides: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _PLACES:
            part, field_name = _PLACES[name]
            overrides.setdefault(part, {})[field_name] = value
        elif name in _PHASES:
            overrides["phases"] = _PHASES[name]
        else:
            overrides[name] = value
    return overrides


def train(run: Run) -> dict[str, Any]:
    """Train `run` with a real Trainer and return what it reached and cost.

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
        warnings.catch_warnings(),
        TemporaryDirectory() as folder,  # of the monitor's energy.json
        contextlib.redirect_stdout(io.StringIO()),  # the decisions of each run
    ):
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*number of training batches.*smaller than the logging interval")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = Trainer(
            **_QUIET,
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


def _flops_ratio(run: Run, model: LightningModule, callback: DGMCallback | None) -> float:
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


def _validate(model: LightningModule, run: Run) -> dict[str, float]:
    trainer = Trainer(**_QUIET)
    (metrics,) = trainer.validate(model, datamodule=task_named(run.task).data(run.seed), verbose=False)
    return dict(metrics)
