"""Callbacks that time every training step and book the joules of the plain ones."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.energy._energy_meter import EnergyMeter
from lightning_estdgm.tools.bench.train._train_config import SETTLE_STEPS
from lightning_estdgm.tools.bench.train._whole import DENSE, Step


class StepClock(Callback):
    """Times each step from the start of its batch to the start of the next; put it first among the callbacks.

    On a GPU by events in its queue, so that nothing waits for the device. The last step has no end and is not told.

    Args:
        dgm: callback of a sparse run; None for a dense one.
        meter: meter that measures already; joules of plain steps are booked under the phase's name. None: no joules.
    """

    def __init__(self, dgm: DGMCallback | None, meter: EnergyMeter | None) -> None:
        self._dgm = dgm
        self._meter = meter
        self._marks: list[Any] = []
        self._plans: list[tuple[str, float, bool, int, int]] = []  # phase, density, observed, updates so far, age
        self._booking = contextlib.ExitStack()
        self._booked = ""
        self.booked_steps: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Close the step before and note what this one is."""
        on_gpu = pl_module.device.type == "cuda"
        if on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())
        self._plans.append(self._plan())
        self._book()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Book no more."""
        self._booking.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Book no more."""
        self._booking.close()

    def steps(self) -> list[Step]:
        """Return every step but the last; waits for the device."""
        found = []
        pairs = zip(self._plans, self._plans[1:], _differences(self._marks), strict=False)
        for (phase, density, observed, updates, age), following, seconds in pairs:
            found.append(Step(phase, density, observed, following[3] > updates, age, seconds))
        return found

    def _plan(self) -> tuple[str, float, bool, int, int]:
        updates = 0 if self._dgm is None or self._dgm.controller is None else self._dgm.controller.updates
        last = self._plans[-1] if self._plans else None
        age = 0 if last is None or last[3] != updates else last[4] + 1
        if self._dgm is None:
            return DENSE, 1.0, False, 0, age
        controller = self._dgm.controller
        assert controller is not None
        plan = controller.schedule(controller.position)
        return plan.phase, plan.density, controller.observing, updates, age

    def _book(self) -> None:
        phase, _, observed, _, age = self._plans[-1]
        wanted = "" if self._meter is None or observed or age < SETTLE_STEPS else phase
        if wanted != self._booked:
            self._booking.close()  # also waits for the device
            if wanted and self._meter is not None:
                self._booking.enter_context(self._meter.window(wanted))
            self._booked = wanted
        if wanted:
            self.booked_steps[wanted] = self.booked_steps.get(wanted, 0) + 1


def _differences(marks: list[Any]) -> Iterable[float]:
    if not marks or isinstance(marks[0], float):
        return [after - before for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]
