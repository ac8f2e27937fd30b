"""A run whose seconds and joules count, for nothing else runs on the machine; and what its network costs to serve."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from typing import Any

import torch
from lightning import LightningModule

from lightning_estdgm.energy import EnergyMeter
from lightning_estdgm.export import packed
from lightning_estdgm.tools.study._study_run import DENSE, StudyRun
from lightning_estdgm.tools.study._tasks import task_named
from lightning_estdgm.tools.study._training import fit, without_trainer

SERVING_S = 2.0
"""Seconds for which a network is served to read its joules."""


def cost(run: StudyRun) -> dict[str, Any]:
    """Train a run, and serve what came out of it.

    Returns:
        Those of `fit`, and ``served_joules``: joules of a validation batch, as `joules_a_batch` has them.

    """
    model, result = fit(run)
    return {**result, "served_joules": joules_a_batch(model, run)}


def joules_a_batch(model: LightningModule, run: StudyRun, seconds: float = SERVING_S) -> float:
    """Return the joules of one validation batch; packed where the network was trained sparse.

    Args:
        model: trained network of the run.
        run: the run.
        seconds: for how long it is served.

    Returns:
        Joules; NaN without a source of energy, and for a sparse network where it cannot be packed, such as without a
        compiler.

    """
    data = task_named(run.task).data(run.seed)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)  # of layers that stay dense: they are served so
        try:
            served = model if run.method == DENSE else packed(model)
        except RuntimeError:
            return math.nan
        without_trainer(served)  # type: ignore[arg-type]
        served.validation_step(batch, 0)  # type: ignore[operator] # what is done once
        count, meter = 0, stack.enter_context(EnergyMeter())
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            served.validation_step(batch, 0)  # type: ignore[operator]
            count += 1
        joules = meter.joules
    return math.nan if joules is None else joules / count
