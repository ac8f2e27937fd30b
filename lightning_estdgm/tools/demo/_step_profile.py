"""Profile of a steady step: the time of its parts."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.tools._quiet import environment_variable, quiet_lightning
from lightning_estdgm.tools.demo._demo_config import MIN_STEPS, DemoConfig
from lightning_estdgm.tools.demo._records import DGM
from lightning_estdgm.tools.demo._session import new_trainer

_LINEAR = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear")
_PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("linear products", lambda name: name in _LINEAR or name.startswith("estdgm::")),
    ("attention", lambda name: "scaled_dot_product" in name or "flash_attention" in name),
    ("optimizer", lambda name: "_fused_adam" in name),
    ("masks", lambda name: name.startswith("[Callback]DGMCallback")),
    ("other", lambda name: name.startswith("[")),  # a range of Lightning's: ends the search upwards
    # Besides the optimizer's own operation, its step holds nothing but the hooks on it.
    ("masks", lambda name: name.startswith("Optimizer.step#")),
)


def profile_steps(config: DemoConfig, mode: str) -> dict[str, Any]:
    """Time of the parts of a steady step, in ms and shares; for EST-DGM a step of the frozen end of refinement.

    A short run of its own with the phases squeezed, so that the timed runs carry no profiler. The profiler slows
    small operations down: read the shares, and take times from the timed runs. "other" is the step's wall time
    less the parts: norms, GELU, embeddings, loss, clipping, data, Lightning, Python.
    """
    count = config.profile_steps
    schedule = config.dgm.schedule
    length = MIN_STEPS + 4 * count
    if isinstance(schedule, EstDgm):
        shares = {"exploration": 0.1, "consolidation": 0.1, "refinement": 0.8}
        phases = {name: replace(getattr(schedule, name), length=share) for name, share in shares.items()}
        schedule = replace(schedule, **phases, cycles=1, warmup=0, update_every=None, observe_steps=None, freeze=0.5)
    profiler = StepProfiler(length, count, with_masks=mode == DGM)
    callbacks: list[Callback] = [profiler]
    if mode == DGM:
        callbacks.insert(0, DGMCallback(replace(config.dgm, schedule=schedule)))
    # What DGMCallback prints has been seen in the timed runs.
    with quiet_lightning(), torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        trainer = new_trainer(
            callbacks, max_steps=length, logger=False, limit_val_batches=0, profiler=LightningRanges()
        )
        trainer.fit(config.model(config.lr(mode)), datamodule=config.data(seed=0))
    return profiler.shares()


class StepProfiler(Callback):
    """Profiles the last steps of a run, whole steps as the `Recorder` cuts them.

    Args:
        length: Steps of the run.
        count: Steps to profile.
        with_masks: Whether the run is sparse, so that there is work on masks.
    """

    def __init__(self, length: int, count: int, with_masks: bool) -> None:
        self.length, self.count, self.with_masks = length, count, with_masks
        self.seen, self.wall_s = 0, 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or stop at the border of two steps."""
        self.seen += 1
        if self.seen == self.length:
            self.wall_s = time.perf_counter() - self.wall_s
            self.profile.stop()
        elif self.seen == self.length - self.count:
            with environment_variable(
                "KINETO_LOG_LEVEL", "99"
            ):  # else it announces itself on stderr; read at its first start
                self.profile.start()
            self.wall_s = time.perf_counter()

    def shares(self) -> dict[str, Any]:
        """Milliseconds a step and share of the step by part; an operation counts without those that it calls."""
        spent = dict.fromkeys((name for name, _ in _PARTS), 0.0)
        for event in self.profile.events():
            part = _part_of(event)
            if part != "other" and (self.with_masks or part != "masks"):
                spent[part] += event.self_cpu_time_total / 1e6
        spent["other"] = self.wall_s - math.fsum(s for name, s in spent.items() if name != "other")
        return {
            "steps": self.count,
            "wall_ms": 1e3 * self.wall_s / self.count,
            "ms": {name: 1e3 * s / self.count for name, s in spent.items()},
            "share": {name: s / self.wall_s for name, s in spent.items()},
        }


class LightningRanges(Profiler):
    """Puts Lightning's own ranges into the profile, to tell operations by the hook they ran in."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, record_function] = {}

    def start(self, action_name: str) -> None:
        """Open the range of a hook."""
        if action_name.startswith("[") and "optimizer_step" not in action_name:
            self._open[action_name] = record_function(action_name)
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        """Close it."""
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)


def _part_of(event: Any) -> str:
    """Part of the step that the event belongs to, or else the nearest event around it that belongs to one."""
    while event is not None:
        for part, belongs in _PARTS:
            if belongs(event.name):
                return part
        event = event.cpu_parent
    return "other"
