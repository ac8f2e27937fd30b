"""`why_not_resized`: whether an optimizer goes on with a parameter that has fewer elements than before, by trial."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._optimizer_trial import apart_from_the_run, remade, trial_optimizer
from lightning_estdgm.engine._state_entries import state_entries
from lightning_estdgm.modules._packed_forward import resize_

_UNITS, _KEPT = 6, 4  # of a throw-away parameter, before and after


def why_not_resized(optimizer: Optimizer, source: Tensor, like: Tensor) -> str:
    """Return the reason why an optimizer does not follow the size of a parameter; empty if it does.

    A throw-away parameter loses units after a step, and so does each state entry that is found. What is kept where it
    is not found, as by an optimizer deep within a wrapper, has the old size in the next step.

    Args:
        optimizer: optimizer of the run, or a wrapper of one; left as it is.
        source: parameter that it holds.
        like: packed parameter, ``[units, rows, columns]``, whose units, dtype and device the trial has.

    """
    with apart_from_the_run(like.device):
        for makes_anew, closure in product((False, True), (False, True)):
            weight = nn.Parameter(torch.ones(_UNITS, *like.shape[1:], dtype=like.dtype, device=like.device))
            try:
                trial = trial_optimizer(optimizer, {source: weight})
                trial = remade(trial) if makes_anew else trial
                _step(trial, weight, closure=closure)
            except Exception:  # whatever an optimizer raises: `_element_trial` says it
                continue
            found = (entry for inner in nested_optimizers(trial) for _, entry in state_entries(inner, weight))
            entries = list({id(entry): entry for entry in found}.values())
            for tensor in (*entries, weight):
                kept = tensor.detach().view(_UNITS, -1)[:_KEPT].clone()
                resize_(tensor, kept.flatten() if tensor.dim() == 1 else kept.view(_KEPT, *like.shape[1:]))
            try:
                _step(trial, weight, closure=closure)
            except Exception:  # as above
                return f"{type(optimizer).__name__} keeps state of its size where it is not found"
            return ""
    return ""


def _step(trial: Optimizer, weight: nn.Parameter, *, closure: bool) -> None:
    def loss() -> float:
        weight.grad = torch.ones_like(weight)
        return 1.0

    loss()
    trial.step(loss) if closure else trial.step()
