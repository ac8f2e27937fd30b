"""`fresh_state_rules`: what an optimizer gives a fresh parameter, found on throw-away parameters.

A throw-away parameter has the real one's shape and dtype. Half of its elements are *quiet*: their gradient is 0 in
every step, as that of inactive weights is. Each tensor of its state is one of

- **constant** where it is quiet, whatever happens elsewhere: a moment, or the code of 0 in a quantised one;
- a **copy of the weights** there;
- **mixed**: it depends there on gradients elsewhere, so it is in another basis (SOAP) or a matrix of its own that has
  the weight's shape by chance (Shampoo's statistics of a square weight);
- a **table**, which depends on neither weights nor gradients;
- a **choice** of weights, in bools, which has state of its size beside it (SaRA).

A vector of fewer elements is looked at where one of its length is a copy of every so many weights (Prodigy's
``slice_p``). Others are left out: factored moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._optimizer_trial import added, apart_from_the_run, remade, trial_optimizer
from lightning_estdgm.engine._placement import Placement, WholeWeight
from lightning_estdgm.engine._rate_trial import has_rate, set_rate
from lightning_estdgm.engine._state_entries import Path, state_entries
from lightning_estdgm.engine._state_rules import Constant, CopyOfWeight, Kept, Requantised, StateRule, Strided

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight

_STEPS = (3, 12)  # of a trial, and of one more if an entry is the same everywhere after the first
_ROUNDING = 0.02  # relative error of copies in bfloat16 or after weight decay
_HISTORY = 3  # steps before a reset that is compared
_RATE = 2.0**-10  # of the step after it, where the run's own is 0, as where it is warmed up
_EXACT, _APART = 1e-6, 0.02  # differences of moves, as shares of the largest, up to which and from which on they count
_REQUANTISED = 0.15  # largest error of a 4-bit state that is written back, as a share of its largest value

_MIXED = Kept("its elements mix the gradients of several weights")
_TABLE = Kept("it depends on neither weights nor gradients")
_CHOICE = Kept("it says which weights have state")


_T = TypeVar("_T")


class TrialFailedError(Exception):
    """An optimizer cannot be copied, or not stepped on throw-away parameters."""


class StateUnknownError(Exception):
    """A state entry is of no known kind.

    Attributes:
        entry: name of the entry.

    """

    def __init__(self, entry: str) -> None:
        super().__init__(entry)
        self.entry = entry


def fresh_state_rules(optimizer: Optimizer, parameter: Tensor) -> dict[tuple[str, Path], StateRule]:
    """Return how each state entry of a parameter is reset, by the class that keeps it and its place.

    Entries that are the same everywhere even after the longest trial are left out: nothing is known of them.

    Args:
        optimizer: optimizer of the run, or a wrapper of one; left as it is.
        parameter: parameter that it holds.

    Raises:
        TrialFailedError: if the optimizer cannot be tried.
        StateUnknownError: if an entry is of no known kind.

    """
    trials = _Trials(optimizer, parameter)
    rules: dict[tuple[str, Path], StateRule] = {}
    for steps in _STEPS:
        still = trials.run(steps, quiet_weights=False)
        moving = trials.run(steps, quiet_weights=True)
        other: dict[tuple[str, Path], _Entry] = {}
        for key, entry in still.items():
            if entry.is_uniform or key not in moving:
                continue
            if entry.is_choice:
                rules[key] = _CHOICE
            elif entry.rule is not None:
                rules[key] = entry.rule
            elif moving[key].is_copy:
                rules[key] = CopyOfWeight()
            elif entry.constant is not None:
                rules[key] = Constant(entry.constant)
            else:
                other = other or trials.run(steps, quiet_weights=True, seed=1)
                rules[key] = _shared(entry, moving[key], other.get(key), ".".join(key[1]))
            if entry.stride > 1:
                rules[key] = Strided(rules[key], entry.stride)
        if not any(entry.is_uniform for key, entry in still.items() if key not in rules):
            break
    return rules


def keeps_more(optimizer: Optimizer, parameter: Tensor, rules: Mapping[tuple[str, Path], StateRule]) -> bool:
    """Return whether an optimizer keeps state of a parameter that a reset by these rules leaves as it is.

    Such state is kept where it is not looked for, as in one flat vector of all parameters. It shows in the step after a
    reset, which is then another than that of elements which begin anew. Where that step depends on other elements, or
    the rules keep entries, nothing is compared.

    Args:
        optimizer: optimizer of the run, or a wrapper of one; left as it is.
        parameter: parameter that it holds.
        rules: result of `fresh_state_rules`.

    """
    if any(isinstance(rule, Kept) for rule in rules.values()):
        return False
    trials = _Trials(optimizer, parameter)
    try:
        fresh = [trials.moves(seed) for seed in (0, 1)]
        size = max(part.abs().max().item() for part in fresh[0])
        return any(
            _largest(one - other) <= _EXACT * size
            and all(_largest(one - trials.moves(seed, rules)[part]) > _APART * size for seed in (0, 1))
            for part, (one, other) in enumerate(zip(*fresh, strict=True))
        )
    except TrialFailedError:
        return False


def _shared(still: _Entry, moving: _Entry, other: _Entry | None, name: str) -> StateRule:
    """Return the rule of an entry that is not constant at quiet elements."""
    if other is None or not _same(moving.quiet, other.quiet):
        return _MIXED
    if _same(still.quiet, moving.quiet):
        return _TABLE
    raise StateUnknownError(name)


class _Entry:
    """One state entry after a trial.

    Attributes:
        quiet: values at quiet elements.
        is_uniform: whether all its elements are equal.
        constant: the number at quiet elements, if it is one.
        is_copy: whether it equals the weight at quiet elements, before or after the steps.
        is_choice: whether it holds bools.
        rule: rule that was found by writing to it, if it is a packed quantised tensor.
        stride: distance of the weights that it has an element for.

    """

    def __init__(self, state: Tensor, quiet: Tensor, before: Tensor, after: Tensor, stride: int = 1) -> None:
        self.stride = stride
        if stride > 1:
            quiet = quiet[quiet % stride == 0] // stride
            before, after = before[::stride], after[::stride]
        packed = hasattr(state, "__tensor_flatten__")
        values = state.dequantize() if packed else state
        values = values.detach().reshape(-1)
        self.is_choice = values.dtype is torch.bool
        self.is_uniform = bool((values == values[0]).all())
        self.quiet = values[quiet].clone()
        same = self.quiet.numel() > 0 and bool((self.quiet == self.quiet[0]).all())
        self.constant = self.quiet[0].item() if same else None
        # Where the optimizer has made all quiet weights 0, as FTRL does, a moment equals them by chance.
        self.is_copy = any(bool(w[quiet].any()) and _close(self.quiet, w[quiet]) for w in (before, after))
        self.rule: StateRule | None = None
        if packed:
            self.constant, self.is_copy = None, False
            if not self.is_uniform and _takes_zeros(state, values, quiet):
                self.rule = Requantised(0.0)


def _takes_zeros(state: Tensor, values: Tensor, quiet: Tensor) -> bool:
    """Whether writing 0 at the quiet elements of a packed tensor leaves all elements as they are, up to rounding."""
    dense = state.dequantize()
    dense.view(-1)[quiet] = 0
    state.copy_(dense)
    after = state.dequantize().reshape(-1)
    return bool(((after - values).abs() <= _REQUANTISED * values.abs().max()).all()) and bool(
        (after[quiet].abs() <= values[quiet].abs() * (1 + _REQUANTISED)).all()
    )


class _Trials:
    """Short runs of a copy of an optimizer on throw-away parameters."""

    def __init__(self, optimizer: Optimizer, parameter: Tensor) -> None:
        self._optimizer, self._parameter = optimizer, parameter
        self._way: tuple[Callable[..., Any], bool] | None = None  # the first that works

    def run(self, steps: int, *, quiet_weights: bool, seed: int = 0) -> dict[tuple[str, Path], _Entry]:
        """Return the state entries after some steps from a fresh parameter.

        Args:
            steps: number of steps.
            quiet_weights: whether weights are other than 0 where gradients are 0.
            seed: seed of the gradients.

        """
        return self._first_way(lambda make, closure: self._run(make, closure, steps, quiet_weights, seed))

    def moves(self, seed: int, rules: Mapping[tuple[str, Path], StateRule] | None = None) -> tuple[Tensor, Tensor]:
        """Return how far elements go in the step in which they begin: without a gradient, and with one.

        Args:
            seed: seed of the gradients before that step, and of other elements in it.
            rules: rules by which they are reset, after steps with gradients; ``None``: they have had none.

        """
        return self._first_way(lambda make, closure: self._moves(make, closure, seed, rules))

    def _first_way(self, run: Callable[[Callable[..., Any], bool], _T]) -> _T:
        """Return the result of a run in the first way that works."""
        ways = [self._way] if self._way else list(product((_added, _emptied, _remade), (False, True)))
        failure: Exception | None = None
        device = local_tensor(self._parameter).device
        for make, closure in ways:
            try:
                with apart_from_the_run(device):
                    torch.manual_seed(0)
                    result = run(make, closure)
            except Exception as error:  # whatever an optimizer that is not ours may raise
                failure = failure or error
                continue
            self._way = (make, closure)
            return result
        raise TrialFailedError(f"{type(failure).__name__}: {failure}") from failure

    def _run(
        self, make: Callable[..., Any], closure: bool, steps: int, quiet_weights: bool, seed: int
    ) -> dict[tuple[str, Path], _Entry]:
        real = local_tensor(self._parameter).detach()
        generator = torch.Generator(real.device).manual_seed(7)
        weight = nn.Parameter(torch.empty_like(real))
        quiet_mask = torch.rand(real.shape, generator=generator, device=real.device) < 0.5
        quiet_mask.view(-1)[0], quiet_mask.view(-1)[-1] = True, False
        with torch.no_grad():
            weight.copy_(_spread(real.shape, generator))
            if not quiet_weights:
                weight.masked_fill_(quiet_mask, 0)
        before = weight.detach().reshape(-1).clone()
        trial = make(self._optimizer, self._parameter, weight)
        gradients = torch.Generator(real.device).manual_seed(100 + seed)
        for _ in range(steps):
            _step(trial, weight, _spread(real.shape, gradients).masked_fill_(quiet_mask, 0), closure)
        after, quiet = weight.detach().reshape(-1), quiet_mask.reshape(-1).nonzero().squeeze(1)
        entries: dict[tuple[str, Path], _Entry] = {}
        for inner in nested_optimizers(trial):
            for path, state in state_entries(inner, weight):
                entries.setdefault((type(inner).__name__, path), _Entry(state, quiet, before, after))
            vectors = [(path, local_tensor(state)) for path, state in state_entries(inner, weight, shorter=True)]
            strides = {len(vector): stride for _, vector in vectors if (stride := _stride(vector, before))}
            for path, vector in vectors:
                if len(vector) in strides:
                    entry = _Entry(vector, quiet, before, after, strides[len(vector)])
                    entries.setdefault((type(inner).__name__, path), entry)
        return entries

    def _moves(
        self, make: Callable[..., Any], closure: bool, seed: int, rules: Mapping[tuple[str, Path], StateRule] | None
    ) -> tuple[Tensor, Tensor]:
        real = local_tensor(self._parameter).detach()
        generator = torch.Generator(real.device).manual_seed(7)
        begin, quiet = torch.rand(2, *real.shape, generator=generator, device=real.device) < 0.5
        for mask in (begin, quiet):
            mask.view(-1)[0], mask.view(-1)[-1] = True, False
        begin.view(-1)[1], quiet.view(-1)[1] = True, False
        weight = nn.Parameter(torch.empty_like(real).copy_(_spread(real.shape, generator)))
        first = _spread(real.shape, generator).masked_fill_(quiet, 0)
        trial = make(self._optimizer, self._parameter, weight)
        gradients = torch.Generator(real.device).manual_seed(100 + seed)
        for _ in range(_HISTORY):
            gradient = _spread(real.shape, gradients)
            if rules is None:
                gradient.masked_fill_(begin, 0)
                weight.detach().masked_fill_(begin, 0)
            _step(trial, weight, gradient, closure)
        weight.detach().masked_fill_(begin, 0)
        if rules is not None:
            _reset_(trial, weight, begin, rules)
        for group in (group for inner in nested_optimizers(trial) for group in inner.param_groups):
            if has_rate(group) and group["lr"] == 0:
                set_rate(group, _RATE)
        gradient = torch.where(begin, first, _spread(real.shape, gradients))
        _step(trial, weight, gradient, closure)
        moved = weight.detach().double()
        return moved[begin & quiet], moved[begin & ~quiet]


@dataclass
class _StandIn:
    """A throw-away parameter in the place of a masked weight, for `StateRule.reset_`."""

    parameter: nn.Parameter
    shard: Whole
    placement: Placement

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach()


def _reset_(trial: Any, weight: nn.Parameter, units: Tensor, rules: Mapping[tuple[str, Path], StateRule]) -> None:
    shard = Whole(weight)
    stand_in = cast("MaskedWeight", _StandIn(weight, shard, WholeWeight(shard, 1)))
    for inner in nested_optimizers(trial):
        kind = type(inner).__name__
        for path, state in state_entries(inner, weight):
            rules[kind, path].reset_(state, stand_in, units)  # raises where nothing is known of an entry
        for path, state in state_entries(inner, weight, shorter=True):
            if isinstance(rule := rules.get((kind, path)), Strided):
                rule.reset_(state, stand_in, units)


def _stride(vector: Tensor, weights: Tensor) -> int:
    """Return the stride of a copy of every so many weights; 0 if a vector is none."""
    least, most = -(-len(weights) // len(vector)), (len(weights) - 1) // (len(vector) - 1)  # by its length
    for offset in (weights[least : most + 1] == vector[1].item()).nonzero().flatten().tolist():
        if torch.equal(weights[:: least + offset].to(vector), vector):
            return int(least + offset)
    return 0


def _step(trial: Any, weight: nn.Parameter, gradient: Tensor, closure: bool) -> None:
    every = [p for group in trial.param_groups for p in group["params"]]
    gradient = torch.empty_like(weight).detach().copy_(gradient)

    def loss() -> Tensor:
        for p in every:
            p.grad = None
        with torch.enable_grad():
            total = (weight * gradient).sum() + sum((p.sum() for p in every if p is not weight), start=0.0)
            total.backward()
        return total.detach()

    loss()
    trial.step(loss) if closure else trial.step()


def _spread(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return random numbers of both signs whose magnitudes are 0.5 to 1.5, so that none is near 0."""
    size, sign = torch.rand(2, *shape, generator=generator, device=generator.device)
    return torch.where(sign < 0.5, -size - 0.5, size + 0.5)


# ---------------------------------------------------------------------- ways to make a parameter known to an optimizer


def _emptied(optimizer: Optimizer, parameter: Any, weight: nn.Parameter) -> Any:
    """Return a copy without state, which makes it in the first step, as most optimizers do."""
    trial = trial_optimizer(optimizer, {parameter: weight})
    for inner in nested_optimizers(trial):
        for group in inner.param_groups:
            if not group["params"]:  # some read the first parameter of each group
                group["params"] = [_small(weight)]
    return trial


def _added(optimizer: Optimizer, parameter: Any, weight: nn.Parameter) -> Any:
    """Return a copy to which the parameter is added: state is made in ``add_param_group``."""
    return added(_emptied(optimizer, parameter, weight))


def _remade(optimizer: Optimizer, parameter: Any, weight: nn.Parameter) -> Any:
    """Return an optimizer of the same class made anew with the group's settings: state is made in ``__init__``."""
    return remade(_emptied(optimizer, parameter, weight))


def _small(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2, dtype=like.dtype, device=like.device))


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _close(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or not a.is_floating_point():
        return False
    return torch.allclose(a.float(), b.float(), rtol=_ROUNDING, atol=1e-6)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=0.0, equal_nan=True)
