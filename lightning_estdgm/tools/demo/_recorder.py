"""Recording of a run while it trains."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.tools.demo._records import MaskMoment, StepLog, Validation

_MAX_CELLS = 96
"""Size of a drawn mask in each direction, at most."""


class Recorder(Callback):
    """Writes down every step (seconds, loss, joules so far, density, phase), validations, and a mask three times.

    A step's seconds run from the end of the step before (of the validation, where one came between) to the point
    where all callbacks before this one have done their work. The recorder's own work is in no step.

    Args:
        monitor: Monitor of the run's energy.
        dgm: Callback that makes the run sparse; None for a dense run.
    """

    def __init__(self, monitor: EnergyMonitor, dgm: DGMCallback | None) -> None:
        self.monitor, self.dgm = monitor, dgm
        self.steps = StepLog()  # not `log`: the Trainer puts its own there
        self.validation: list[Validation] = []
        self.moments: list[MaskMoment] = []
        self.batches = hashlib.blake2b(digest_size=16)
        self.energy: dict[str, Any] = {}
        self.origin = self.mark = 0.0
        self._validation_j = self._validation_from_j = 0.0
        self._moments: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; note the ends of the first, a middle and the last phase, when masks are drawn."""
        if self.dgm is not None:
            ends = [s.last - 1 for s in self.dgm.schedule.segments if s.phase != "warmup"]
            self._moments = {ends[0], ends[len(ends) // 2], ends[-1]}
        self.origin = self.mark = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note density, phase and work on the masks of the step."""
        entered = time.perf_counter()
        step, log = len(self.steps), self.steps
        for part in batch:
            self.batches.update(part.to("cpu", torch.uint8).contiguous().numpy().tobytes())
        if self.dgm is None:
            now = (1.0, "train", False, False)
        else:
            plan, following = self.dgm.schedule(step), self.dgm.schedule(step + 1)
            is_last = step + 1 >= self.dgm.schedule.total_steps
            now = (self.dgm.density, plan.phase, plan.observe, following.update and not is_last)
            if step in self._moments:
                layer, mask = next(iter(self.dgm.masks().items()))
                self.moments.append(MaskMoment(layer, step, plan.phase, float(mask.float().mean()), _cells(mask)))
        for column, value in zip((log.density, log.phase, log.observed, log.updated), now, strict=True):
            column.append(value)  # type: ignore[attr-defined]
        self.mark += time.perf_counter() - entered

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the step's clock, then look at the joules."""
        loss = float(outputs["loss"])  # waits for the device
        now = time.perf_counter()
        joules = self.monitor.total_joules
        self.steps.wall_s.append(now - self.mark)
        self.steps.clock_s.append(now - self.origin)
        self.steps.loss.append(loss)
        self.steps.total_j.append(joules)
        self.steps.train_j.append(None if joules is None else joules - self._validation_j)
        self.mark = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the joules before."""
        self._validation_from_j = self.monitor.total_joules or 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the loss, and take the validation's time and joules out of the training's."""
        joules = self.monitor.total_joules
        self._validation_j += (joules or 0.0) - self._validation_from_j
        loss = float(trainer.callback_metrics["val/loss"])
        self.mark = time.perf_counter()
        train_j = None if joules is None else joules - self._validation_j
        self.validation.append(Validation(len(self.steps), self.mark - self.origin, train_j, loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitor's own account."""
        self.energy = self.monitor.summary()


def _cells(mask: Tensor) -> list[list[float]]:
    """A unit mask as rows of active shares, averaged down to a size that can be drawn."""
    shares = mask.flatten(1).float()
    size = (min(len(shares), _MAX_CELLS), min(shares.shape[1], _MAX_CELLS))
    return F.adaptive_avg_pool2d(shares[None], size)[0].tolist()
