"""`why_not_by_element`: whether an optimizer steps the active units alone as it steps them within a masked weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._optimizer_trial import added, apart_from_the_run, not_tried, remade, trial_optimizer
from lightning_estdgm.engine._rate_trial import has_rate, set_rate
from lightning_estdgm.engine._state_entries import state_entries
from lightning_estdgm.modules._packed_forward import resize_

_STEPS = 12  # rectified optimizers change their ways after the fifth
_ROWS, _COLUMNS = 4, 6  # of the grid of units, half of which are active
_SIDE = 256  # of a whole weight whose state is looked at: from a size on, some optimizers factor it
_RATE = 2.0**-10  # of every trial: the run's own may be 0, as where it is warmed up
_ALIKE = 1e-5
_QUANTISED, _BLOCK = 4096, 256  # states are quantised from this size on, or where it is a multiple of the block's


def why_not_by_element(optimizer: Optimizer, index: int, like: Tensor, shape: tuple[int, ...] = ()) -> str:
    """Return the reason why an optimizer does not work element by element; empty if it does.

    It steps two throw-away parameters, each in a copy of it: a matrix of which half the units are masked, and these
    units' active elements alone, in another order. An optimizer of matrices, one that factors its moments or scales a
    step by a mean over the weight steps the two differently. A third one, as large as the whole weight, has units taken
    away between two steps: quantised states, which are kept for large weights only, do not follow that. The state of a
    weight of `shape`, or of 256 rows and columns if it has more, must not be factored.

    Args:
        optimizer: optimizer whose own step reads its groups; left as it is.
        index: index of the group whose settings are tried.
        like: parameter of all units, ``[units, rows, columns]``, whose units, dtype and device the trial has.
        shape: shape of the weight as it is stored whole; empty: no such state is looked at.

    """
    kind = type(optimizer).__name__
    if any(isinstance(inner, LBFGS) for inner in nested_optimizers(optimizer)):
        return f"{kind} keeps a history of the whole model"
    failure: Exception | None = None
    with apart_from_the_run(like.device):
        for make, closure in product((_as_it_is, added, remade), (False, True)):
            try:
                return _Trial(optimizer, index, like, shape, make, closure).verdict(kind)
            except Exception as error:  # whatever an optimizer that is not ours may raise
                failure = failure or error
    assert failure is not None
    return not_tried(optimizer, failure)


class _Trial:
    """One trial of an optimizer; `make` and `closure` say how a copy is made and stepped."""

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        like: Tensor,
        shape: tuple[int, ...],
        make: Callable[[Optimizer], Optimizer],
        closure: bool,
    ) -> None:
        self._optimizer, self._index = optimizer, index
        self._shape = tuple(min(side, _SIDE) for side in shape)
        self._make, self._closure, self._like = make, closure, like
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
        gradients = noise[1:] * self._mask
        # The first has no part along the weight in any of its rows, on which projections such as AdamP's depend.
        values = self._values.float()
        along = (values * gradients[0]).sum(1, keepdim=True) / values.square().sum(1, keepdim=True).clamp(min=1e-12)
        gradients[0] -= along * values
        self._gradients = gradients.to(like.dtype)
        self._tolerance = max(_ALIKE, 4 * torch.finfo(like.dtype).eps)

    def verdict(self, kind: str) -> str:
        """Return the reason; empty if both take the same steps, and a large one can lose units."""
        packed, misfit = self._steps(packed=True)
        if not misfit:
            whole, _ = self._steps(packed=False)
            difference, size = (whole - packed).abs().max(), whole.abs().max()
            if bool(whole.isfinite().all()) and not bool(difference <= self._tolerance * size):
                return f"a step of {kind} is made of the whole weight, not element by element"
            misfit = self._misfit_when_whole() or self._misfit_when_large()
        return f"{kind} keeps a state {misfit}" if misfit else ""

    def _misfit_when_whole(self) -> str:
        """Return which state of a weight that is stored whole has no element for each of its; empty if all have."""
        if not self._shape:
            return ""
        weight = nn.Parameter(torch.zeros(self._shape, dtype=self._like.dtype, device=self._like.device))
        trial = self._copy(weight)
        self._step(trial, weight, torch.ones_like(weight))
        return _too_small(trial, weight)

    def _misfit_when_large(self) -> str:
        """Return which state of a large weight is no element's own, in words; empty if the weight can lose units.

        Raises:
            Exception: whatever a step raises after the weight has lost half of its units.

        """
        units, rows, columns = self._like.shape
        even = 2 * _BLOCK // gcd(2 * _BLOCK, rows * columns)  # units whose half is a number of blocks, too
        units = -(-max(units, 2 * _QUANTISED // (rows * columns) + 1) // even) * even
        values = torch.zeros(units, rows, columns, dtype=self._like.dtype, device=self._like.device)
        values.view(-1)[::2] = 1  # half of them, for optimizers that choose by magnitude
        weight = nn.Parameter(values)
        trial = self._copy(weight)
        for left in (units, units // 2):
            with torch.no_grad():
                for tensor in {id(x): x for x in (weight, *_entries(trial, weight))}.values():
                    kept = tensor.view(-1, rows * columns)[:left]
                    resize_(tensor, kept.flatten() if tensor.dim() == 1 else kept.view(left, rows, columns))
            self._step(trial, weight, torch.ones_like(weight))
            if misfit := _too_small(trial, weight):
                return misfit
        return ""

    def _steps(self, *, packed: bool) -> tuple[Tensor, str]:
        """Return the active elements' moves in all steps, in the order of the packed, and which state is unfit."""
        torch.manual_seed(0)
        weight = nn.Parameter(self._in_order(self._values) if packed else self._values.clone())
        trial = self._copy(weight)
        moves = []
        for gradient in self._gradients:
            before = weight.detach().clone()
            given = self._in_order(gradient) if packed else gradient
            self._step(trial, weight, given)
            if not packed:
                weight.detach().mul_(self._mask)
            move = (weight.detach() - before).double().cpu()
            moves.append(move if packed else self._in_order(move))
        return torch.stack(moves), _too_small(trial, weight) or _shared(trial, weight)

    def _copy(self, weight: nn.Parameter) -> Optimizer:
        trial = trial_optimizer(self._optimizer, {self._optimizer.param_groups[self._index]["params"][0]: weight})
        for group in trial.param_groups:
            group["params"][:] = []
        trial.param_groups[self._index]["params"][:] = [weight]
        trial = self._make(trial)
        if has_rate(trial.param_groups[self._index]):
            set_rate(trial.param_groups[self._index], _RATE)
        return trial

    def _step(self, trial: Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
        def loss() -> float:
            weight.grad = gradient.clone()
            return float((gradient * weight.detach()).sum())

        if self._closure:
            trial.step(loss)
        else:
            loss()
            trial.step()

    def _in_order(self, whole: Tensor) -> Tensor:
        return whole[self._mask.to(whole.device)][self._order.to(whole.device)].view(self._packed_shape)


def _as_it_is(trial: Optimizer) -> Optimizer:
    return trial


def _too_small(trial: Optimizer, weight: nn.Parameter) -> str:
    """Return in words which state of the weight is neither a number nor has an element for each of its."""
    fitting = {id(entry) for entry in _entries(trial, weight)}
    for inner in nested_optimizers(trial):
        state = getattr(inner, "state", {}).get(weight, {})
        for name, value in state.items() if isinstance(state, dict) else ():
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and (
                    (tensor.numel() > 1 and id(tensor) not in fitting) or hasattr(tensor, "__tensor_flatten__")
                ):
                    return f"{str(name)!r} that has no element for each of the weight's"
    return ""


def _shared(trial: Optimizer, weight: nn.Parameter) -> str:
    """Return in words which state has one number in every element, after steps by gradients that differ."""
    for inner in nested_optimizers(trial):
        for path, entry in state_entries(inner, weight):
            first = entry.reshape(-1)[0]
            if bool(first) and bool((entry == first).all()):
                return f"{path[-1]!r} that is one number for the whole weight"
    return ""


def _entries(trial: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    nested = nested_optimizers(trial)  # a wrapper may show the state of the optimizer within
    return [entry for inner in nested for _, entry in state_entries(inner, weight)]
