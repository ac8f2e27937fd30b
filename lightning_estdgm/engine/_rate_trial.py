"""`why_not_scaled`: whether an optimizer's steps follow the learning rate of each parameter's group, found by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.engine._optimizer_trial import apart_from_the_run, not_tried, remade, trial_optimizer
from lightning_estdgm.engine._scaled_groups import Group, ScaledGroups

_STEPS = 8  # of each half of a trial: rectified optimizers rest for the first five
_RATE = 2.0**-10  # of every trial: the run's own may be 0, as where it is warmed up
_SIDE = 8  # of a throw-away parameter
_ALIKE = 1e-2  # largest difference of two equal moves, as a share: what a low-precision parameter rounds
_REST = 2.0**-10  # factor on the rate of a half in which no parameter should move far
_UNDONE = 0.9  # share of the moves before that such a half undoes where the rate is one of all steps so far
_MORE = 1.1  # smallest factor on a move by twice the rate that shows that the rate is read


def why_not_scaled(optimizer: Optimizer, index: int, parameters: Sequence[Tensor], like: Tensor) -> str:
    """Return the reason why steps of a group's parameters cannot be scaled by their learning rate; empty if they can.

    Copies of the optimizer take some steps with two throw-away parameters of equal values and gradients. Where the
    groups are split by `ScaledGroups`, each of the two has to move as it does where the user gives both its rate; a
    rate twice as large has to move a parameter further, at the start and later; and steps by a tiny rate must not undo
    those before. So an optimizer fails that has no rate per group, mixes its groups' rates, reads a rate once,
    evaluates the loss several times in a step, or computes weights anew from sums of gradients, as FTRL and dual
    averaging do: their rate multiplies all that was learned, whenever the density changes.

    Args:
        optimizer: optimizer whose own step reads its groups.
        index: index of the group.
        parameters: parameters of the group to stand in for; may be empty.
        like: parameter whose number of dimensions, dtype and device the throw-away ones have.

    """
    kind = type(optimizer).__name__
    if not has_rate(optimizer.param_groups[index]):
        return f"{kind} has no learning rate of its own in the parameter group"
    with apart_from_the_run(like.device):
        trial = _Trial(optimizer, index, parameters, like)
        try:
            plain = trial.moves((1.0, 1.0), (1.0, 1.0))
            if trial.evaluations > 1:
                return f"{kind} evaluates the loss several times in a step"
            kept, raised = trial.moves((2.0, 2.0), (2.0, 2.0)), trial.moves((2.0, 2.0), (4.0, 4.0))
            split = trial.moves((1.0, 2.0), (1.0, 4.0), split=True)
            before, rest = trial.moves((1.0, 1.0), (_REST, _REST), zeros=True)
        except Exception as error:  # whatever an optimizer raises, it is left unscaled
            return not_tried(optimizer, error)
    if not all(bool(move.isfinite().all()) and bool(move.any()) for move in plain):
        return f"{kind} did not move a parameter in {2 * _STEPS} steps of a trial"
    if not (_further(kept[0], plain[0]) and _further(raised[1], kept[1])):
        return f"{kind} does not step by the learning rate of the parameter group"
    expected = [torch.stack([one[0], other[1]]) for one, other in zip(plain, raised, strict=True)]
    if not all(_alike(ours, theirs) for ours, theirs in zip(split, expected, strict=True)):
        return f"{kind} does not step each parameter by the learning rate of its own group"
    if bool((-rest * before).sum() > _UNDONE * before.square().sum()):
        return f"{kind} computes weights anew by the learning rate: a change of it multiplies them"
    return ""


class _Trial:
    """Trials of one optimizer, each with a fresh copy of it.

    Attributes:
        evaluations: largest number of calls of a step's closure, of all steps so far.

    """

    def __init__(self, optimizer: Optimizer, index: int, parameters: Sequence[Tensor], like: Tensor) -> None:
        self.evaluations = 0
        self._optimizer, self._index, self._parameters = optimizer, index, parameters[:2]
        generator = torch.Generator().manual_seed(0)
        shape = [_SIDE] * max(1, like.dim())
        self._values, self._gradient = (
            (torch.randn(shape, generator=generator, device="cpu") * size).to(like.device, like.dtype)
            for size in (2.0**-7, 1.0)
        )
        self._way: tuple[bool, bool] | None = None  # whether it is made anew, and takes a closure: the first that works

    def moves(self, *halves: tuple[float, float], split: bool = False, zeros: bool = False) -> list[Tensor]:
        """Return how far both parameters move in each half of a trial, ``[2, ...]``.

        Args:
            *halves: factors on the rates of the two parameters in each half; without `split`, both are the same.
            split: whether the rates are scaled by `ScaledGroups`, rather than set in the groups.
            zeros: whether the parameters begin at 0.

        """
        if self._way is not None:
            return self._moves(*self._way, halves, split=split, zeros=zeros)
        failures = []
        for way in product((False, True), (False, True)):
            try:
                moved = self._moves(*way, halves, split=split, zeros=zeros)
            except Exception as error:  # maybe for want of a closure, or of the state that ``__init__`` makes
                failures.append(error)
            else:
                self._way = way
                return moved
        raise failures[1]  # with a closure

    def _moves(
        self, makes_anew: bool, takes_closure: bool, halves: Sequence[tuple[float, float]], *, split: bool, zeros: bool
    ) -> list[Tensor]:
        torch.manual_seed(0)  # rounding and updates may be random
        values = torch.zeros_like(self._values) if zeros else self._values
        stand_ins = [nn.Parameter(values.clone()) for _ in range(2)]
        trial = trial_optimizer(self._optimizer, dict(zip(self._parameters, stand_ins, strict=False)))
        held: list[Tensor] = trial.param_groups[self._index]["params"]
        held[:] = stand_ins
        if makes_anew:
            trial = remade(trial)
        rates = ScaledGroups(trial)
        moved = []
        for factors in halves:
            set_rate(trial.param_groups[self._index], _RATE * (1.0 if split else factors[0]))
            before = torch.stack([parameter.detach().clone() for parameter in stand_ins])
            scales = dict(zip(map(id, stand_ins), factors, strict=True)) if split else {}
            for _ in range(_STEPS):
                self._step(trial, stand_ins, rates, scales, takes_closure=takes_closure)
            moved.append((torch.stack([p.detach() for p in stand_ins]) - before).double().cpu())
        return moved

    def _step(
        self,
        trial: Optimizer,
        stand_ins: Sequence[Tensor],
        rates: ScaledGroups,
        scales: Mapping[int, float],
        *,
        takes_closure: bool,
    ) -> None:
        calls = 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            rates.leave()
            for parameter in stand_ins:
                parameter.grad = self._gradient.clone()
            rates.enter(scales)
            return sum(float((self._gradient * p.detach()).sum()) for p in stand_ins)

        if takes_closure:
            trial.step(closure)
        else:
            closure()
            trial.step()
        rates.leave()
        self.evaluations = max(self.evaluations, calls)


def has_rate(group: Group) -> bool:
    """Whether a group has a learning rate: a number, also one of numpy's, or a tensor."""
    return isinstance(group.get("lr"), Real | Tensor)


def set_rate(group: Group, rate: float) -> None:
    """Set a group's learning rate, in place where it is a tensor, as schedulers do."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _further(move: Tensor, than: Tensor) -> bool:
    """Whether a move goes further than another, along it."""
    return bool((move * than).sum() > _MORE * than.square().sum())


def _alike(move: Tensor, other: Tensor) -> bool:
    return bool((move - other).abs().max() <= _ALIKE * other.abs().max())
