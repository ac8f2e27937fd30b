"""`OptimizerStates`: the optimizers' state of dropped and grown units becomes that of a fresh parameter.

What a fresh parameter has is found on throw-away parameters (`_state_trial`), before the run changes anything. Where an
entry was not seen there, because the optimizer makes it later or cannot be tried, it is read from the state of units
that have had no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._optimizer_trial import TrialMemory
from lightning_estdgm.engine._state_entries import Path, entry_name, state_entries
from lightning_estdgm.engine._state_rules import Constant, StateRule, Strided, copies_weight, oriented
from lightning_estdgm.engine._state_trial import StateUnknownError, TrialFailedError, fresh_state_rules, keeps_more
from lightning_estdgm.method._masks import expand_mask

Rules = dict[tuple[int, Path], StateRule]
"""Rules by the id of the optimizer that keeps the entry, of which there may be several of one class, and its place."""


class OptimizerStates:
    """The state that the optimizers of a run keep for the masked weights.

    Args:
        optimizers: optimizers of the run; those that they wrap are found.

    Attributes:
        optimizers: optimizers of the run; `prepare` has to be called for others.

    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self._rules: dict[int, Rules] = {}  # by the id of the parameter
        self._known: dict[Any, Rules] = {}  # by the id of the optimizer, and what else a trial depends on
        self._warned: set[str] = set()

    def prepare(self, weights: Sequence[MaskedWeight], *, changes_masks: bool) -> None:
        """Find what a fresh parameter has, by trial. Neither the optimizers nor the random numbers of the run change.

        One trial is made for each shape and dtype of the masked weights and the groups that hold them.

        Args:
            weights: masked weights.
            changes_masks: whether the schedule has any mask update.

        Raises:
            ValueError: if masks change, and an entry of the state is none that can be reset.

        """
        nested = [nested_optimizers(optimizer) for optimizer in self.optimizers]
        ids = {id(inner) for all_of_it in nested for inner in all_of_it}  # another may have the id of one that is gone
        for parameter, rules in self._rules.items():
            self._rules[parameter] = {of: rule for of, rule in rules.items() if of[0] in ids}
        known = self._known = {key: rules for key, rules in self._known.items() if key[0] in ids}
        for weight in weights:
            local = local_tensor(weight.parameter)
            for optimizer, all_of_it in zip(self.optimizers, nested, strict=True):
                groups = [_group_of(one, weight.parameter) for one in all_of_it]
                if groups[0] is None:
                    continue
                # Of ZeRO's optimizers, the inner one holds this rank's weights alone.
                key = (
                    id(optimizer),
                    changes_masks,
                    *groups,
                    tuple(local.shape),
                    local.stride(),
                    local.dtype,
                    local.device,
                )
                if key not in known:
                    known[key] = self._tried(optimizer, weight, changes_masks)
                self._rules.setdefault(id(weight.parameter), {}).update(known[key])

    def knows(self, weight: MaskedWeight) -> bool:
        """Whether `prepare` has found an optimizer that holds the weight."""
        return id(weight.parameter) in self._rules

    def reset_(self, weight: MaskedWeight, units: Tensor, *, before: Tensor | None = None) -> None:
        """Give the units of a weight the state of a fresh parameter; steps counts and the like stay.

        Args:
            weight: weight, with its new values.
            units: bool of the mask's shape, true where state is reset.
            before: mask before the update, from which units are known that have had no gradient.

        """
        for optimizer, path, state in self.entries(weight):
            rule = self._rule(weight, optimizer, path) or self._observed(
                entry_name(optimizer, path), state, weight, before
            )
            if rule is not None:
                rule.reset_(state, weight, units)
        for state, strided in self._strided(weight):
            strided.reset_(state, weight, units)

    @torch.no_grad()
    def follow_drawn_(self, weight: MaskedWeight, scale: float) -> None:
        """Bring state that exists already in line with a mask just drawn: copies of kept weights are scaled as these.

        Args:
            weight: weight, with its new values.
            scale: factor by which it was scaled. A packed weight may have been loaded anew: its copies are made anew.

        """
        known: list[tuple[Tensor, StateRule | None]] = [
            (state, self._rule(weight, optimizer, path)) for optimizer, path, state in self.entries(weight)
        ]
        for state, rule in [*known, *self._strided(weight)]:
            if rule is not None:
                keeps = weight.inactive.stored or not copies_weight(rule)
                if copies_weight(rule) and scale != 1:
                    local_tensor(state).detach().mul_(scale)
                rule.reset_(state, weight, ~weight.mask if keeps else torch.ones_like(weight.mask))

    def forget_curvature(self) -> None:
        """Clear the history of L-BFGS, whose differences of gradients are those of other weights after an update."""
        for optimizer in self._every:
            if isinstance(optimizer, LBFGS):
                optimizer.state.clear()

    def fresh_value(self, weight: MaskedWeight, optimizer: Optimizer, name: str) -> float:
        """Return the number that a fresh parameter has in an entry of ``optimizer.state``; 0 where there is no one."""
        rule = self._rule(weight, optimizer, ("state", name))
        return rule.value if isinstance(rule, Constant) else 0.0

    # ------------------------------------------------------------------

    @property
    def _every(self) -> list[Any]:
        found = [inner for optimizer in self.optimizers for inner in nested_optimizers(optimizer)]
        return list({id(optimizer): optimizer for optimizer in found}.values())

    def _rule(self, weight: MaskedWeight, optimizer: Optimizer, path: Path) -> StateRule | None:
        return self._rules.get(id(weight.parameter), {}).get((id(optimizer), path))

    def entries(self, weight: MaskedWeight) -> Iterator[tuple[Optimizer, Path, Tensor]]:
        """Yield each tensor once, by a place with a rule if any: a wrapper may hold the state of what it wraps."""
        rules = self._rules.get(id(weight.parameter), {})
        found: dict[int, tuple[Optimizer, Path, Tensor]] = {}  # by id; kept, as ids of gone ones are used again
        for optimizer in self._every:
            if isinstance(optimizer, LBFGS):
                continue
            for path, state in state_entries(optimizer, weight.parameter):
                known = found.get(id(state))
                if known is None or ((id(known[0]), known[1]) not in rules and (id(optimizer), path) in rules):
                    found[id(state)] = optimizer, path, state
        yield from found.values()

    def _strided(self, weight: MaskedWeight) -> Iterator[tuple[Tensor, Strided]]:
        """Yield the entries with an element for every so many weights."""
        rules = self._rules.get(id(weight.parameter), {})
        if not any(isinstance(rule, Strided) for rule in rules.values()):
            return
        for optimizer in self._every:
            for path, state in state_entries(optimizer, weight.parameter, shorter=True):
                rule = rules.get((id(optimizer), path))
                if isinstance(rule, Strided) and rule.fits(state, weight):
                    yield state, rule
                elif isinstance(rule, Strided):
                    self._warn_of_kept(entry_name(optimizer, path), weight)

    def _tried(self, optimizer: Optimizer, weight: MaskedWeight, changes_masks: bool) -> Rules:
        if local_tensor(weight.parameter).numel() < 2 or any(
            isinstance(o, LBFGS) for o in nested_optimizers(optimizer)
        ):
            return {}
        failures = []
        nested = nested_optimizers(optimizer)
        is_elsewhere = len(nested) > 1 and all(_group_of(o, weight.parameter) is None for o in nested[1:])
        for candidate in nested:
            if _group_of(candidate, weight.parameter) is None:
                continue
            try:
                rules, keeps = _fresh(candidate, weight.parameter, changes_masks)
            except TrialFailedError as error:
                failures.append(f"{type(candidate).__name__}: {error}")
            except StateUnknownError as error:
                if not changes_masks:
                    return {}
                raise ValueError(
                    f"layer {weight.name!r}: {type(candidate).__name__} keeps a state {error.entry!r} of which is not "
                    "known what a fresh parameter has: it is neither the same everywhere, nor a copy of the weights, "
                    "nor made of several weights' gradients, so that it cannot be reset where weights are dropped and "
                    "grown. Exclude the layers that this optimizer holds (Selection(exclude=...)), or take a schedule "
                    "whose masks do not change"
                ) from error
            else:
                if keeps:
                    self._warn(
                        f"{type(candidate).__name__} keeps state of layer {weight.name!r} in a place that is not "
                        "searched: it stays as it is where weights are dropped or grown. Have the optimizer keep it by "
                        "parameter, as optimizer.state[parameter][name], in the parameter's shape"
                    )
                return {
                    (id(inner), path): rule
                    for inner in nested_optimizers(candidate)
                    for (kind, path), rule in rules.items()
                    if kind == type(inner).__name__
                }
        if failures and changes_masks and not is_elsewhere:  # of ZeRO, another rank keeps the state
            self._warn(
                f"could not try {failures[0]}. What its state is for a fresh parameter is read from weights that have "
                "had no gradient, at the first mask update; what is not kept by parameter stays"
            )
        return {}

    def _observed(self, entry: str, state: Tensor, weight: MaskedWeight, before: Tensor | None) -> StateRule | None:
        """Return the rule for an entry by its values at units without gradients; ``None`` and a warning without one."""
        rule: StateRule | None = None
        if before is not None and not weight.inactive.act_in_forward and not hasattr(state, "__tensor_flatten__"):
            quiet = weight.placement.address(~before & ~weight.mask)
            local = oriented(state, weight)
            if weight.placement.grain != 1:
                quiet = expand_mask(quiet, weight.placement.grain)
            if quiet.dim() < local.dim():
                quiet = quiet.reshape(*quiet.shape, *[1] * (local.dim() - quiet.dim()))
            values = local[quiet.expand_as(local)]
            if values.numel() and bool((values == values[0]).all()):
                rule = Constant(values[0].item())
        if rule is None:
            self._warn_of_kept(entry, weight)
        return rule

    def _warn_of_kept(self, entry: str, weight: MaskedWeight) -> None:
        self._warn(
            f"the optimizer's state {entry!r} is kept as it is where weights of layer {weight.name!r} were dropped "
            "or grown: what a fresh parameter has there could not be found"
        )

    def _warn(self, message: str) -> None:
        if message.split(" of layer")[0] not in self._warned:
            self._warned.add(message.split(" of layer")[0])
            warnings.warn(message, RuntimeWarning, stacklevel=4)


_found: TrialMemory[tuple[Mapping[tuple[str, Path], StateRule], bool]] = TrialMemory()


def _fresh(
    optimizer: Optimizer, parameter: Tensor, changes_masks: bool
) -> tuple[Mapping[tuple[str, Path], StateRule], bool]:
    """Return the rules of a parameter's state, and whether there is more, of which masks that change have to know."""

    def try_it() -> tuple[Mapping[tuple[str, Path], StateRule], bool]:
        rules = fresh_state_rules(optimizer, parameter)
        return rules, changes_masks and keeps_more(optimizer, parameter, rules)

    index, local = _group_of(optimizer, parameter), local_tensor(parameter)
    assert index is not None
    more = (type(parameter), tuple(local.shape), local.stride(), parameter.requires_grad, changes_masks)
    found = _found.recall(optimizer, index, local, try_it, *more)
    if all(getattr(getattr(rule, "rule", rule), "value", 0) == 0 for rule in found[0].values()):
        return found
    # A number may be made of the rate, as Rprop's step sizes are.
    return _found.recall(optimizer, index, local, try_it, *more, repr(optimizer.param_groups[index].get("lr")))


def _group_of(optimizer: Any, parameter: Tensor) -> int | None:
    """Return the index of the group that holds a parameter; ``None`` if none does."""
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        if any(held is parameter for held in group["params"]):
            return index
    return None
