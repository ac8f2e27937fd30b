"""Trainer, progress bar and surroundings of the demo's runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_estdgm.tools._progress import Steps, progress_of, waiting
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.bench._environment import environment
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._recorder import Recorder


class ProgressBar(Callback):
    """Moves the progress over all runs, with the run, the phase, the density and the loss."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.recorder: Recorder | None = None

    def begin(self, title: str, recorder: Recorder) -> None:
        """Go on with the next run."""
        self.recorder = recorder
        self._steps.begin(title)

    def expect(self, steps: int) -> None:
        """Count on so many steps more."""
        self._steps.expect(steps)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._steps.say(text)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        assert self.recorder is not None
        log = self.recorder.steps
        self._steps.advance(f"{log.phase[-1]}, density {log.density[-1]:.2f}, loss {log.loss[-1]:.3f}")


def new_trainer(callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """A Trainer on one CPU that prints and keeps nothing."""
    return Trainer(
        **QUIET_TRAINER,
        devices=1,
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        **settings,
    )


@contextmanager
def session(config: DemoConfig, runs: int, console: Console) -> Iterator[ProgressBar]:
    """Show the progress over a number of runs and keep Lightning quiet; restore the global random state afterwards."""
    with torch.random.fork_rng(devices=[]), quiet_lightning():
        with waiting(console, "Warming up: one step that is not measured"):
            _warm_up(config)
        with progress_of(console, runs * config.steps) as steps:
            yield ProgressBar(steps)


def _warm_up(config: DemoConfig) -> None:
    """One step that is not measured, or the dense run, which comes first, would pay the libraries' first calls."""
    model = config.model(config.lr_dense)
    x = torch.zeros(config.batch_size, config.context, dtype=torch.long)
    model.loss((x, x)).backward()


def header(config: DemoConfig, command: str) -> dict[str, Any]:
    """Head of the demo's JSON: command, date, configuration, environment and data."""
    data = config.data(seed=0)
    data.setup()
    return {
        "command": command,
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": config.as_dict(),
        "environment": environment(),
        "data": data.describe(),
    }
