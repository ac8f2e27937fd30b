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

_STEPS = 8  # of each stage of a trial: rectified optimizers rest for the first five
_RATE = 2.0**-10  # of every trial: the run's own may be 0, as where it is warmed up
_SIDE = 8  # of a throw-away parameter
_ALIKE = 1e-2  # largest difference of two equal moves, as a share: what a low-precision parameter rounds
_MIXED = 0.1  # largest difference, as such a share, of moves in a split group: rounding may be random
_NEXT = 1.0 + 2.0**-52  # factor on a rate that splits a group and changes no move
_REST = 2.0**-10  # factor on the rate of a stage in which no parameter should move far
_UNDONE = 0.9  # share of the moves before that such a stage undoes where the rate is one of all steps so far
_MORE = 1.1  # smallest factor on a move by twice the rate that shows that the rate is read
_SPARSE = 4  # of so many entries, a sparse throw-away parameter has one
_GROWN = _SPARSE**0.75  # between the root, by which a norm over the parameter makes moves grow, and `_SPARSE` itself


def why_not_scaled(optimizer: Optimizer, index: int, parameters: Sequence[Tensor], like: Tensor) -> str:
    """Return the reason why steps of a group's parameters cannot be scaled by their learning rate; empty if they can.

    Copies of the optimizer take some steps with two throw-away parameters of equal values and gradients. Where the
    groups are split by `ScaledGroups`, each of the two has to move as it does where the user gives both its rate; a
    rate twice as large has to move a parameter further, at the start and later; steps by a tiny rate must not undo
    those before; and entries of a sparse parameter must not move further by 1 / density. Two parameters of unlike
    gradients have to move on as before where their group is split in mid-run, and where one moves to the other's part.
    So an optimizer fails that has no rate per group, mixes its groups' rates, reads a rate once, keeps something of
    each parameter in the group, evaluates the loss several times in a step, divides its step by the share of the
    entries that it moves, as cautious ones do, or computes weights anew from sums of gradients, as FTRL and dual
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
    if _keeps_group(optimizer, optimizer.param_groups[index]):
        return f"{kind} keeps the parameter group in its state, and may read the learning rate there"
    with apart_from_the_run(like.device):
        trial = _Trial(optimizer, index, parameters, like)
        try:
            plain = trial.moves((1.0, 1.0), (1.0, 1.0))
            if trial.evaluations > 1:
                return f"{kind} evaluates the loss several times in a step"
            kept, raised = trial.moves((2.0, 2.0), (2.0, 2.0)), trial.moves((2.0, 2.0), (4.0, 4.0))
            split = trial.moves((1.0, 2.0), (1.0, 4.0), split=True)
            before, rest = trial.moves((1.0, 1.0), (_REST, _REST), zeros=True)
            few = _Trial(optimizer, index, parameters, like, sparse=True)
            sparse = few.moves((1.0, 1.0), (1.0, 1.0))
            together = trial.moves(*[(1.0, 1.0)] * 3, unlike=True)
            regrouped = trial.moves((1.0, 1.0), (1.0, _NEXT), (_NEXT, _NEXT), split=True, unlike=True)
        except Exception as error:  # whatever an optimizer raises, it is left unscaled
            return not_tried(optimizer, error)
    if not all(bool(move.isfinite().all()) and bool(move.any()) for move in plain):
        return f"{kind} did not move a parameter in {2 * _STEPS} steps of a trial"
    if not (_further(kept[0], plain[0]) and _further(raised[1], kept[1])):
        return f"{kind} does not step by the learning rate of the parameter group"
    expected = [torch.stack([one[0], other[1]]) for one, other in zip(plain, raised, strict=True)]
    if not all(_alike(ours, theirs) for ours, theirs in zip(split, expected, strict=True)):
        return f"{kind} does not step each parameter by the learning rate of its own group"
    if not all(_alike(ours, theirs, _MIXED) for ours, theirs in zip(regrouped, together, strict=True)):
        return (
            f"{kind} steps otherwise once its parameter group is split: it keeps something of several parameters there"
        )
    if bool((-rest * before).sum() > _UNDONE * before.square().sum()):
        return f"{kind} computes weights anew by the learning rate: a change of it multiplies them"
    if all(_growth(move, full, few.active) > _GROWN for move, full in zip(sparse, plain, strict=True)):
        return f"steps of {kind} grow by 1 / density by themselves"
    return ""


class _Trial:
    """Trials of one optimizer, each with a fresh copy of it.

    Args:
        optimizer: as in `why_not_scaled`, and so are `index`, `parameters` and `like`.
        sparse: whether parameters and gradients are 0 but for some entries, as many in each row and column.

    Attributes:
        active: mask of the entries that have a gradient.
        evaluations: largest number of calls of a step's closure, of all steps so far.

    """

    def __init__(
        self, optimizer: Optimizer, index: int, parameters: Sequence[Tensor], like: Tensor, *, sparse: bool = False
    ) -> None:
        self.evaluations = 0
        self._optimizer, self._index, self._parameters = optimizer, index, parameters[:2]
        generator = torch.Generator().manual_seed(0)
        shape = [_SIDE] * max(1, like.dim())
        self.active = torch.stack(torch.meshgrid([torch.arange(_SIDE, device="cpu")] * len(shape), indexing="ij"))
        self.active = self.active.sum(0) % (_SPARSE if sparse else 1) == 0
        self._values, self._gradient = (
            (torch.randn(shape, generator=generator, device="cpu") * size * self.active).to(like.device, like.dtype)
            for size in (2.0**-7, 1.0)
        )
        self._way: tuple[bool, bool] | None = None  # whether it is made anew, and takes a closure: the first that works

    def moves(self, *stages: tuple[float, float], **how: bool) -> list[Tensor]:
        """Return how far both parameters move in each stage of a trial, ``[2, ...]``.

        Args:
            *stages: factors on the rates of the two parameters in each stage; without `split`, both are the same.
            **how: see `_moves`.

        """
        if self._way is not None:
            return self._moves(*self._way, stages, **how)
        failures = []
        for way in product((False, True), (False, True)):
            try:
                moved = self._moves(*way, stages, **how)
            except Exception as error:  # maybe for want of a closure, or of the state that ``__init__`` makes
                failures.append(error)
            else:
                self._way = way
                return moved
        raise failures[1]  # with a closure

    def _moves(
        self,
        makes_anew: bool,
        takes_closure: bool,
        stages: Sequence[tuple[float, float]],
        *,
        split: bool = False,
        zeros: bool = False,
        unlike: bool = False,
    ) -> list[Tensor]:
        """Return the moves in each stage of a trial.

        Args:
            makes_anew: whether the optimizer is made anew.
            takes_closure: whether its step is given a closure.
            stages: see `moves`.
            split: whether the rates are scaled by `ScaledGroups`, rather than set in the groups.
            zeros: whether the parameters begin at 0.
            unlike: whether their gradients differ, in sign and size.

        """
        torch.manual_seed(0)  # rounding and updates may be random
        values = torch.zeros_like(self._values) if zeros else self._values
        stand_ins = [nn.Parameter(values.clone()) for _ in range(2)]
        gradients = [self._gradient, self._gradient * (-2.0 if unlike else 1.0)]
        trial = trial_optimizer(self._optimizer, dict(zip(self._parameters, stand_ins, strict=False)))
        held: list[Tensor] = trial.param_groups[self._index]["params"]
        held[:] = stand_ins
        if makes_anew:
            trial = remade(trial)
        rates = ScaledGroups(trial)
        moved = []
        for factors in stages:
            set_rate(trial.param_groups[self._index], _RATE * (1.0 if split else factors[0]))
            before = torch.stack([parameter.detach().clone() for parameter in stand_ins])
            scales = dict(zip(map(id, stand_ins), factors, strict=True)) if split else {}
            for _ in range(_STEPS):
                self._step(trial, stand_ins, gradients, rates, scales, takes_closure=takes_closure)
            moved.append((torch.stack([p.detach() for p in stand_ins]) - before).double().cpu())
        return moved

    def _step(
        self,
        trial: Optimizer,
        stand_ins: Sequence[Tensor],
        gradients: Sequence[Tensor],
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
            for parameter, gradient in zip(stand_ins, gradients, strict=True):
                parameter.grad = gradient.clone()
            rates.enter(scales)
            return sum(float((gradient * p.detach()).sum()) for p, gradient in zip(stand_ins, gradients, strict=True))

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


def _keeps_group(optimizer: Optimizer, group: Group) -> bool:
    """Whether state holds the group itself, as for steps of one parameter within the backward, by `step(param=...)`."""
    states = (state for state in optimizer.state.values() if isinstance(state, Mapping))
    return any(value is group for state in states for value in state.values())


def _further(move: Tensor, than: Tensor) -> bool:
    """Whether a move goes further than another, along it."""
    return bool((move * than).sum() > _MORE * than.square().sum())


def _growth(move: Tensor, than: Tensor, active: Tensor) -> float:
    """Return how many times as far a move goes as another, over the active entries."""
    return float(move[:, active].norm() / than[:, active].norm())


def _alike(move: Tensor, other: Tensor, share: float = _ALIKE) -> bool:
    return bool((move - other).abs().max() <= share * other.abs().max())
