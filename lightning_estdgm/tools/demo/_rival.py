"""The rival of a sparse run: a smaller dense network with as many weights to serve, trained for as many joules."""

from __future__ import annotations

import math
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.tools._quiet import quiet_lightning
from lightning_estdgm.tools.demo._demo_config import MIN_STEPS, DemoConfig
from lightning_estdgm.tools.demo._recorder import Recorder
from lightning_estdgm.tools.demo._records import SMALL, RunRecord
from lightning_estdgm.tools.demo._session import new_trainer

_FIRST, _STEPS = 10, 50
"""Steps of the pilot that are not counted, and all of its steps."""


def rival_of(config: DemoConfig, run: RunRecord) -> DemoConfig:
    """Return the smaller dense network's configuration: its width, and the steps that the joules of ``run`` buy.

    A few steps of the smaller network say what a step costs. Where no energy source can be read, seconds stand for
    joules.
    """
    small = replace(config, width=rival_width(config, run.served_weights))
    spent = run.energy.get("train_joules")
    joules, seconds = _cost_of_a_step(small)
    bought = spent / joules if spent and joules else (run.setup_s + math.fsum(run.steps.wall_s)) / seconds
    parts = config.validations  # a multiple of it, so that the last step is validated
    return replace(small, steps=max(MIN_STEPS, parts * round(bought / parts)))


def rival_width(config: DemoConfig, weights: int) -> int:
    """Return the width of the largest model with at most so many weights, all else alike; no less than ``heads``."""
    width = config.heads
    while width + config.heads <= config.width and _size(replace(config, width=width + config.heads)) <= weights:
        width += config.heads
    return width


def _size(config: DemoConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.model(config.lr(SMALL)).parameters())


def _cost_of_a_step(config: DemoConfig) -> tuple[float | None, float]:
    """Return joules (None without an energy source) and seconds of a step of the smaller network."""
    monitor = EnergyMonitor(interval_s=0.02)
    recorder = Recorder(monitor, None)
    with quiet_lightning(), torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:  # for energy.json
        settings = {"logger": False, "limit_val_batches": 0, "default_root_dir": folder}
        trainer = new_trainer([monitor, recorder], max_steps=_STEPS, **settings)
        trainer.fit(config.model(config.lr(SMALL)), datamodule=config.data(seed=0))
    counted = _STEPS - _FIRST
    first, last = recorder.steps.train_j[_FIRST - 1], recorder.steps.train_j[-1]
    joules = None if first is None or last is None else (last - first) / counted
    return joules, math.fsum(recorder.steps.wall_s[_FIRST:]) / counted
