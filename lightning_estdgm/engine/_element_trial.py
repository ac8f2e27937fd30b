"""`why_not_by_element`: whether an optimizer steps the active units alone as it steps them within a masked weight."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._optimizer_trial import apart_from_the_run, not_tried, remade, trial_optimizer
from lightning_estdgm.engine._rate_trial import set_rate
from lightning_estdgm.engine._state_entries import state_entries

_STEPS = 12  # rectified optimizers change their ways after the fifth
_ROWS, _COLUMNS = 4, 6  # of the grid of units, half of which are active
_RATE = 2.0**-10  # of every trial: the run's own may be 0, as where it is warmed up
_ALIKE = 1e-5


def why_not_by_element(optimizer: Optimizer, index: int, like: Tensor) -> str:
    """Return the reason why an optimizer does not work element by element; empty if it does.

    It steps two throw-away parameters, each in a copy of it: a matrix of which half the units are masked, and these
    units' active elements alone, in another order. An optimizer of matrices, one that factors its moments or scales a
    step by a mean over the weight steps the two differently.

    Args:
        optimizer: optimizer whose own step reads its groups; left as it is.
        index: index of the group whose settings are tried.
        like: packed parameter, ``[units, rows, columns]``, whose units, dtype and device the trial has.

    """
    kind = type(optimizer).__name__
    if any(isinstance(inner, LBFGS) for inner in nested_optimizers(optimizer)):
        return f"{kind} keeps a history of the whole model"
    failure: Exception | None = None
    with apart_from_the_run(like.device):
        for makes_anew, closure in product((False, True), (False, True)):
            try:
                return _Trial(optimizer, index, like, makes_anew=makes_anew, closure=closure).verdict(kind)
            except Exception as error:  # whatever an optimizer that is not ours may raise
                failure = failure or error
    assert failure is not None
    return not_tried(optimizer, failure)


class _Trial:
    """One trial of an optimizer; `makes_anew` and `closure` say how a copy is made and stepped."""

    def __init__(self, optimizer: Optimizer, index: int, like: Tensor, *, makes_anew: bool, closure: bool) -> None:
        self._optimizer, self._index = optimizer, index
        self._makes_anew, self._closure = makes_anew, closure
        generator = torch.Generator().manual_seed(0)
        _, rows, columns = like.shape
        units = _ROWS * _COLUMNS
        grid = torch.randperm(units, generator=generator, device="cpu").view(_ROWS, _COLUMNS) < units // 2
        self._mask = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1).to(like.device)
        size = int(self._mask.sum())
        self._order = torch.randperm(size, generator=generator, device="cpu").to(like.device)
        self._packed_shape = (units // 2, rows, columns)
        noise = torch.randn(_STEPS + 1, *self._mask.shape, generator=generator, device="cpu").to(like.device)
        self._values = ((noise[0] * 2.0**-4) * self._mask).to(like.dtype)
        self._gradients = (noise[1:] * self._mask).to(like.dtype)
        self._tolerance = max(_ALIKE, 4 * torch.finfo(like.dtype).eps)

    def verdict(self, kind: str) -> str:
        """Return the reason; empty if both take the same steps."""
        packed, state = self._steps(packed=True)
        if state:
            return f"{kind} keeps a state {state!r} that has no element for each of the weight's"
        whole, _ = self._steps(packed=False)
        difference, size = (whole - packed).abs().max(), whole.abs().max()
        if not bool(whole.isfinite().all()) or bool(difference <= self._tolerance * size):
            return ""
        return f"a step of {kind} is made of the whole weight, not element by element"

    def _steps(self, *, packed: bool) -> tuple[Tensor, str]:
        """Return the active elements' moves in all steps, in the order of the packed, and a state that is too small."""
        torch.manual_seed(0)
        weight = nn.Parameter(self._in_order(self._values) if packed else self._values.clone())
        source = self._optimizer.param_groups[self._index]["params"][0]
        trial = trial_optimizer(self._optimizer, {source: weight})
        for group in trial.param_groups:
            group["params"][:] = []
        trial.param_groups[self._index]["params"][:] = [weight]
        if self._makes_anew:
            trial = remade(trial)
        if isinstance(trial.param_groups[self._index].get("lr"), int | float | Tensor):
            set_rate(trial.param_groups[self._index], _RATE)
        moves = []
        for gradient in self._gradients:
            before = weight.detach().clone()
            given = self._in_order(gradient) if packed else gradient

            def loss(given: Tensor = given) -> float:
                weight.grad = given.clone()
                return float((given * weight.detach()).sum())

            if self._closure:
                trial.step(loss)
            else:
                loss()
                trial.step()
            if not packed:
                weight.detach().mul_(self._mask)
            move = (weight.detach() - before).double().cpu()
            moves.append(move if packed else self._in_order(move))
        return torch.stack(moves), _too_small(trial, weight)

    def _in_order(self, whole: Tensor) -> Tensor:
        return whole[self._mask.to(whole.device)][self._order.to(whole.device)].view(self._packed_shape)


def _too_small(trial: Optimizer, weight: nn.Parameter) -> str:
    """Return the name of a state of the weight that is neither a number nor has an element for each of its."""
    nested = nested_optimizers(trial)  # a wrapper may show the state of the optimizer within
    fitting = {id(entry) for inner in nested for _, entry in state_entries(inner, weight)}
    for inner in nested:
        state = getattr(inner, "state", {}).get(weight, {})
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.numel() > 1 and id(value) not in fitting:
                return str(name)
            if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
                return str(name)
    return ""
