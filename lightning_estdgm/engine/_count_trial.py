"""`unit_counts`: whether an optimizer's steps depend on a count of steps that each unit needs for itself, by trial.

A count matters where a weight that begins anew late steps otherwise than a fresh parameter does. Whether `YoungSteps`
mends that, is seen on throw-away parameters, too, so that no optimizer is known by its name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.engine._optimizer_trial import (
    PLAIN,
    TrialMemory,
    apart_from_the_run,
    not_tried,
    remade,
    trial_optimizer,
)
from lightning_estdgm.engine._rate_trial import set_rate
from lightning_estdgm.engine._state_entries import state_entries
from lightning_estdgm.engine._young_steps import YoungSteps
from lightning_estdgm.engine._young_units import Cohort, YoungUnits

SETTLED = 1e-3
"""Difference of two steps, as a share, from which on a unit is young no more; four roundings if that is more."""

_RATE = 2.0**-10  # of every trial: the run's own may be 0, as where it is warmed up
_SIDE = 8  # of a throw-away parameter; half of its rows begin late
_STEPS = 12  # that are compared: rectified optimizers change their ways after the fifth
_RESTS = (7, 200)  # steps before the late rows begin
_LATE = 1_000_000  # count of a late parameter, where it can be set
_EQUAL = 128  # steps of one size before counts are set, so that moments have come to it
_PROBES = 32  # counts that are tried at once
_LONGEST = 12_000  # steps; what does not settle by then is no correction, but a schedule


@dataclass(frozen=True)
class UnitCounts:
    """Treatment of an optimizer's count of steps.

    Attributes:
        lifetime: number of steps for which a unit needs a count of its own; 0: none.
        own_state: whether the count changes more than the weight: entries of the state too.
        why_not: reason why units that would need one have none, in words; empty if there are no such.

    """

    lifetime: int = 0
    why_not: str = ""
    own_state: bool = True


_known: TrialMemory[UnitCounts] = TrialMemory()
_why_not: TrialMemory[str] = TrialMemory()  # of `_why_not_in_parts`


def unit_counts(optimizer: Optimizer, index: int, like: Tensor) -> UnitCounts:
    """Return for how long a unit that begins anew needs a count of steps of its own.

    Args:
        optimizer: optimizer whose own step reads its groups; left as it is.
        index: index of the group whose settings are tried.
        like: parameter of the group. The throw-away ones have its number of dimensions, dtype and device.

    """
    if isinstance(optimizer, LBFGS):  # its history is cleared at mask updates
        return UnitCounts()
    real = local_tensor(like).detach()

    def try_it() -> UnitCounts:
        with apart_from_the_run(real.device):
            return _tried(optimizer, index, real)

    found = _known.recall(optimizer, index, real, try_it)
    if not found.lifetime:
        return found
    why = _why_not.recall(optimizer, index, real, lambda: _why_not_in_parts(optimizer, index, real), tuple(real.shape))
    return UnitCounts(0, why) if why else found


def _tried(optimizer: Optimizer, index: int, like: Tensor) -> UnitCounts:
    kind = type(optimizer).__name__
    coarse = torch.finfo(like.dtype).eps if like.is_floating_point() else 0.0
    try:
        trial = _Trial(optimizer, index, like)
        fresh = trial.first()
        late = [trial.run(rest) for rest in _RESTS]
        if all(_alike(fresh.young, run.young, max(SETTLED, 4 * coarse)) for run in late):
            return UnitCounts()
        if not trial.is_by_element(max(1e-5, 4 * coarse)):
            return UnitCounts(0, f"a step of {kind} is made of the whole weight")
        counted = [trial.run(rest, by_unit=True) for rest in _RESTS]
        if not all(_alike(fresh.young, run.young, max(1e-5, 4 * coarse)) for run in counted):
            return UnitCounts(0, f"{kind} keeps it outside a parameter's state, or mixes parameters")
        if not all(_alike(one.old, run.old, coarse) for one, run in zip(late, counted, strict=True)):
            return UnitCounts(0, f"{kind} mixes parameters")
        shared = [trial.run(rest, by_unit=True, own_state=False) for rest in _RESTS]
        own_state = not all(_alike(fresh.young, run.young, max(1e-5, 4 * coarse)) for run in shared)
        lifetime = trial.lifetime(max(SETTLED, 4 * coarse))
    except Exception as error:  # whatever an optimizer that is not ours may raise
        return UnitCounts(0, not_tried(optimizer, error))
    if lifetime == 0:
        return UnitCounts(0, f"{kind} has a schedule by it")
    return UnitCounts(lifetime, own_state=own_state)


@dataclass(frozen=True)
class _Run:
    """Moves of a throw-away parameter in the steps that are compared, float64, on the CPU.

    Attributes:
        old: moves of the rows that have had gradients all the time, ``[steps, ...]``.
        young: moves of the rows that have begun late.

    """

    old: Tensor
    young: Tensor


@dataclass
class _StandIn:
    """A throw-away parameter in the place of a masked weight; see `_young_steps.SteppedWeight`."""

    parameter: nn.Parameter
    young: YoungUnits
    shard: Whole

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach()

    @property
    def gradient(self) -> Tensor | None:
        return self.parameter.grad


class _Trial:
    """Trials of one optimizer, each with a fresh copy of it."""

    def __init__(self, optimizer: Optimizer, index: int, like: Tensor) -> None:
        self._optimizer, self._index = optimizer, index
        self._makes_anew = False
        self._shape = [_SIDE] * max(1, like.dim())
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(_STEPS, generator=generator, device="cpu")
        sizes = 2.0 ** torch.linspace(-3, 3, _STEPS, device="cpu")[order]
        noise = [torch.randn(self._shape, generator=generator, device="cpu") for _ in range(_STEPS + 1)]
        self._values = (noise.pop() * 2.0**-7).to(like.device, like.dtype)
        self._values[_SIDE // 2 :] = 0
        self._gradients = [(n * size).to(like.device, like.dtype) for n, size in zip(noise, sizes, strict=True)]

    def first(self) -> _Run:
        """Return the moves of a parameter that begins at once; see too whether ``__init__`` alone makes its state."""
        try:
            return self.run(0)
        except Exception:
            self._makes_anew = True
            with contextlib.suppress(Exception):
                return self.run(0)
            raise

    def run(self, rest: int, *, by_unit: bool = False, own_state: bool = True, flat: bool = False) -> _Run:
        """Return the moves after some steps in which half of the rows have no gradient.

        Args:
            rest: number of these steps.
            by_unit: whether that half has a count of its own.
            own_state: whether its state is what its own steps made of it, not what the whole weight's did.
            flat: whether the parameter is a vector of the same elements.

        """
        torch.manual_seed(0)  # rounding and updates may be random
        weight = nn.Parameter((self._values.flatten() if flat else self._values).clone())
        trial = self._copy(weight)
        for step in range(rest):
            quiet = self._gradients[step % _STEPS].clone()
            quiet[_SIDE // 2 :] = 0
            weight.grad = quiet
            trial.step()
        weight.data.view(self._shape)[_SIDE // 2 :] = 0  # as masks do, and there may be 0 / 0
        young = YoungUnits()
        if by_unit:
            half = torch.arange(weight.numel() // 2, weight.numel(), device=weight.device, dtype=torch.int32)
            young.live(_STEPS + 1, own_state=own_state)
            young.cohorts = [Cohort(half, half, 0, {})]
        units, stand_in = YoungSteps(trial), _StandIn(weight, young, Whole(weight))
        moves = []
        for gradient in self._gradients:
            before = weight.detach().clone()
            weight.grad = gradient.reshape(weight.shape).clone()
            units.enter({id(weight): stand_in})
            trial.step()
            units.commit()
            moves.append((weight.detach() - before).double().cpu().view(self._shape))
        old, late = torch.stack(moves).chunk(2, dim=1)
        return _Run(old, late)

    def is_by_element(self, tolerance: float) -> bool:
        """Whether a vector of the same elements takes the same steps."""
        try:
            flat = self.run(0, flat=True)
        except Exception:  # as of an optimizer of matrices
            return False
        return _alike(self.run(0).young, flat.young, tolerance)

    def lifetime(self, tolerance: float) -> int:
        """Return the number of steps after which those of two counts have settled; 0: they have not.

        What is compared is the size of a step from one and the same state, by the count that is set in it.
        """
        low, high = 0, _LONGEST  # as steps: the last that differs is in between
        while high - low > 1:
            counts = sorted({*(low + round((high - low) ** (i / _PROBES)) for i in range(_PROBES)), high})
            *sizes, settled = self._sizes([*counts, _LATE])
            apart = [not abs(size - settled) <= tolerance * abs(size) for size in sizes]
            if apart[-1]:
                return 0
            last = max((i for i, differs in enumerate(apart) if differs), default=-1)
            low, high = (counts[last] if last >= 0 else low), counts[last + 1]
            if last < 0:
                break
        return max(low, 1)

    def _sizes(self, counts: Sequence[int]) -> list[float]:
        """Return the sizes of the steps that have these counts, each from the state of many equal steps before."""
        one = nn.Parameter(torch.zeros_like(self._values))
        trial = self._copy(one)
        before: dict[str, float] = {}
        for _ in range(_EQUAL):
            before = _numbers(trial.state.get(one, {}))
            self._step(trial, [one])
        now = _numbers(trial.state[one])
        counted = [key for key, number in now.items() if number == before.get(key, float("nan")) + 1.0]
        several = [nn.Parameter(torch.zeros_like(one)) for _ in counts]
        for count, weight in zip(counts, several, strict=True):
            state = copy.deepcopy(dict(trial.state[one]))
            for key in counted:
                number = state[key]
                state[key] = number.fill_(count - 1) if isinstance(number, Tensor) else type(number)(count - 1)
            trial.state[weight] = state
        trial.param_groups[self._index]["params"][:] = several
        return self._step(trial, several)

    @staticmethod
    @torch.no_grad()
    def _step(trial: Optimizer, weights: Sequence[nn.Parameter]) -> list[float]:
        """Take a step from 0, so that weight decay does nothing; return how far each weight goes."""
        for weight in weights:
            weight.zero_()
            weight.grad = torch.full_like(weight, 2.0**-3)
        trial.step()
        return [weight.view(-1)[0].item() for weight in weights]

    def _copy(self, weight: nn.Parameter) -> Optimizer:
        trial = trial_optimizer(self._optimizer, {self._optimizer.param_groups[self._index]["params"][0]: weight})
        for group in trial.param_groups:
            group["params"][:] = []
        trial.param_groups[self._index]["params"][:] = [weight]
        if self._makes_anew:
            trial = remade(trial)
        set_rate(trial.param_groups[self._index], _RATE)
        return trial


def _numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the single numbers of a parameter's state."""
    return {
        key: float(value)
        for key, value in state.items()
        if (isinstance(value, Tensor) and value.dim() == 0)
        or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _alike(moves: Tensor, others: Tensor, tolerance: float) -> bool:
    """Whether moves are equal in each step, up to a share of the step's largest."""
    difference, size = ((x.flatten(1).abs().max(1).values) for x in (moves - others, moves))
    return bool((difference <= tolerance * size).all())


def _why_not_in_parts(optimizer: Optimizer, index: int, like: Tensor) -> str:
    """Return why the state of a parameter of a certain shape has no part for each element; empty if it has.

    Quantised states are kept for large parameters only, so that a small one does not show it.
    """
    if like.numel() == 0:
        return ""
    weight = nn.Parameter(torch.zeros_like(like))
    weight.grad = torch.ones_like(weight)
    trial = trial_optimizer(optimizer, {optimizer.param_groups[index]["params"][0]: weight})
    trial.param_groups[index]["params"][:] = [weight]
    trial.step()
    places = [path for path, _ in state_entries(trial, weight)]
    if all(len(path) == 2 and path[0] == "state" for path in places) and all(
        _is_in_parts(value, weight) for value in trial.state[weight].values()
    ):
        return ""
    return f"{type(optimizer).__name__} does not keep its state element by element"


def _is_in_parts(value: Any, weight: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, PLAIN)
    plain = value.is_floating_point() and not hasattr(value, "__tensor_flatten__")
    return value.dim() == 0 or (plain and value.numel() == weight.numel())
