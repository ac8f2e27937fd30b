"""`StepScaling`: hooks by which the optimizers see the learning rates of masked weights scaled by their density.

They see young units as parameters of their own as well. See `config.StepSize`. How groups are split is in
`_scaled_groups`, how young units are shown in `_young_steps`; how it is found out whether that works in `_rate_trial`
and `_count_trial`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_estdgm.distributed._collectives import agree
from lightning_estdgm.engine._count_trial import UnitCounts, unit_counts
from lightning_estdgm.engine._hooked_optimizers import closure_of, parameters_of, with_closure, with_step_hooks
from lightning_estdgm.engine._optimizer_trial import TrialMemory
from lightning_estdgm.engine._rate_trial import why_not_scaled
from lightning_estdgm.engine._scaled_groups import Group, ScaledGroups
from lightning_estdgm.engine._young_steps import YoungSteps

if TYPE_CHECKING:
    from lightning_estdgm.config import StepSize
    from lightning_estdgm.engine._masked_weight import MaskedWeight

_PLAIN = (bool, int, float, str, Tensor)  # what a checkpoint holds that loads with ``weights_only=True``


_reasons: TrialMemory[str] = TrialMemory()  # of `why_not_scaled`


class StepScaling:
    """Scaling of the steps of all masked weights of a run, by the learning rates that their optimizers see.

    Of nested optimizers, the innermost that holds a weight makes its step, so that one sees the scaled rate. Groups
    are split once the step's gradients are there: after its closure, in which user code may read and set rates.

    Args:
        optimizers: optimizers of the run.
        step_size: settings.
        grows: whether units are grown whose state is reset.

    """

    def __init__(self, optimizers: Sequence[Optimizer], step_size: StepSize, *, grows: bool = False) -> None:
        self._optimizers = _hooked(optimizers)
        self._step_size = step_size
        self._grows = grows
        self._steps: list[_ScaledSteps] = []
        self._resumed: Sequence[dict[str, Group]] = ()  # state for `register`, or from before `remove`

    @property
    def entered(self) -> bool:
        """Whether an optimizer sees its groups split, or young units."""
        return any(steps.groups.entered or steps.young.entered for steps in self._steps)

    def register(
        self, weights: Mapping[int, MaskedWeight], before: Mapping[int, _ScaledSteps] = MappingProxyType({})
    ) -> None:
        """Hook the optimizers that step the masked weights, given by the id of their parameters.

        Weights whose optimizer fails the trial are not scaled; their `note` says why.

        Args:
            weights: masked weights.
            before: what was found of optimizers that stay, by their ids.

        """
        if self._step_size.exponent == 0.0 and not self._grows:
            return
        for optimizer in self._optimizers:
            inner = self._inside(optimizer)
            if any(_delegates(optimizer, other) for other in inner):
                continue
            elsewhere = {id(parameter) for other in inner for parameter in parameters_of(other)}
            own = {key: weight for key, weight in weights.items() if key not in elsewhere}
            grows = self._grows and not any(_holds_part(outer, optimizer) for outer in self._optimizers)
            if self._grows and not grows and _needs_counts(optimizer):
                for key in own.keys() & {id(p) for outer in self._optimizers for p in parameters_of(outer)}:
                    _add_note(own[key], "grown weights share its count of steps: its optimizer's state is on one rank")
            self._steps.append(
                _ScaledSteps(optimizer, own, self._step_size, grows=grows, before=before.get(id(optimizer)))
            )
        counted = {key for steps in self._steps for key in steps.counted}
        for key, weight in weights.items():
            if key not in counted and weight.young.lifetime:  # who counted its steps is not there any more
                weight.young.live(0)
        self.load_state_dict(self._resumed)

    def values(self) -> dict[int, dict[str, Group]]:
        """Return what `state_dict` does, by the ids of the optimizers."""
        return {id(steps.optimizer): steps.state_dict() for steps in self._steps}

    def use(
        self,
        optimizers: Sequence[Optimizer],
        weights: Mapping[int, MaskedWeight],
        values: Mapping[int, dict[str, Group]] | None = None,
    ) -> None:
        """Go on with other optimizers; the groups of those that stay keep their values.

        Args:
            optimizers: all optimizers from now on.
            weights: masked weights, by the id of their parameters.
            values: `values` of before; ``None``: of now.

        """
        kept = self.values() if values is None else values
        before = {id(steps.optimizer): steps for steps in self._steps}
        self.remove()
        self._optimizers, self._resumed = _hooked(optimizers), ()
        self.register(weights, before)
        for steps in self._steps:
            steps.load_state_dict(kept.get(id(steps.optimizer), {}))

    def _inside(self, optimizer: Optimizer) -> list[Optimizer]:
        """Return the optimizers that one wraps; of two that hold each other, the one found first wraps the other."""
        place = {id(found): i for i, found in enumerate(self._optimizers)}
        return [
            other
            for other in with_step_hooks(optimizer)[1:]
            if place[id(other)] > place[id(optimizer)] or all(o is not optimizer for o in with_step_hooks(other))
        ]

    def give_back(self) -> None:
        """Give all groups back, as after a step that raised; steps that begin later begin anew."""
        for steps in self._steps:
            steps.give_back()

    def remove(self) -> None:
        """Give all groups back and remove the hooks; `state_dict` stays what it was. May be called twice."""
        self.give_back()
        self._resumed = self.state_dict()
        for steps in self._steps:
            steps.remove()
        self._steps.clear()

    def state_dict(self) -> list[dict[str, Group]]:
        """Return for each optimizer and layer what differs in its group from the user's group, in plain types."""
        return [steps.state_dict() for steps in self._steps] or list(self._resumed)

    def load_state_dict(self, state: Sequence[dict[str, Group]]) -> None:
        """Let the layers of a resumed run go on with these values; may be called before `register`."""
        self._resumed = state
        for steps, values in zip(self._steps, state, strict=False):
            steps.load_state_dict(values)


def _hooked(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    return list({id(inner): inner for optimizer in optimizers for inner in with_step_hooks(optimizer)}.values())


class _ScaledSteps:
    """Steps of one optimizer, with the groups that it sees during them.

    Args:
        optimizer: optimizer whose own step moves weights.
        weights: masked weights that it may hold, now or later, by the id of their parameters.
        step_size: settings.
        grows: whether units are grown whose state is reset.
        before: what was found of the same optimizer before.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Mapping[int, MaskedWeight],
        step_size: StepSize,
        *,
        grows: bool,
        before: _ScaledSteps | None = None,
    ) -> None:
        self.groups = ScaledGroups(optimizer, scales_decay=step_size.scale_weight_decay)
        self.young = YoungSteps(optimizer)
        self.optimizer = optimizer
        self._weights = weights
        self._exponent = step_size.exponent
        self._depth = 0  # a subclass's step that calls its parent's runs the hooks twice
        self._reasons: dict[int, str] = {}  # against scaling, by the group's index; empty if it can be scaled
        self._reasons_by_settings: dict[str, str] = {}  # for groups that differ in their rate and parameters only
        self._uncounted = dict(weights) if grows else {}  # of which it is not known how the optimizer counts
        self.counted: dict[int, MaskedWeight] = {}  # whose grown units it steps by a count of their own
        if before is not None:
            self._reasons, self._reasons_by_settings = before._reasons, before._reasons_by_settings
            for key in before._weights.keys() - before._uncounted.keys():
                weight = self._uncounted.pop(key, None)
                if weight is not None and key in before.counted:
                    self.counted[key] = weight
        for index, group in enumerate(optimizer.param_groups):
            self._can_scale(index, group)
        self._count_units()
        self._pre_hook = optimizer.register_step_pre_hook(self._before_step)
        post_hook = optimizer.register_step_post_hook(self._after_step)
        cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(post_hook.id, last=False)
        self._handles = [
            self._pre_hook,
            post_hook,
            optimizer.register_state_dict_pre_hook(self._give_back_first),
            optimizer.register_load_state_dict_pre_hook(self._give_back_first),
        ]

    def give_back(self) -> None:
        """Give the groups back; the next step is not within one that began before."""
        self._leave()
        self._depth = 0
        if self._handles:  # hooks that were registered since see the user's groups, too
            cast(OrderedDict[int, Any], self.optimizer._optimizer_step_pre_hooks).move_to_end(self._pre_hook.id)

    def remove(self) -> None:
        """Give the groups back and remove the hooks."""
        self._leave()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Group]:
        """Return what the optimizer keeps of each layer's group that differs from the user's group."""
        return {
            self._weights[key].name: {k: v for k, v in own.items() if isinstance(v, _PLAIN)}
            for key, own in self.groups.own_values().items()
            if key in self._weights
        }

    def load_state_dict(self, state: Mapping[str, Group]) -> None:
        """Let layers go on with these values, where they do not go on from an earlier step."""
        named = {weight.name: key for key, weight in self._weights.items()}
        self.groups.resumed = {named[name]: values for name, values in state.items() if name in named}

    # ------------------------------------------------------------------ hooks

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        closure = closure_of(args, kwargs)
        if closure is not None:
            return with_closure(args, kwargs, self._around(closure))
        self._enter()
        return None

    def _enter(self) -> None:
        if self.groups.entered or self.young.entered:
            return  # a subclass's step that calls its parent's, whose closure is wrapped twice
        self._count_units()
        self.groups.enter(self._scales())
        self.young.enter(self.counted)

    def _leave(self) -> None:
        """Give the groups back as they were; what the optimizer made of young units by themselves is lost."""
        self.young.discard()
        self.groups.leave()

    def _around(self, closure: Any) -> Any:
        """Return a closure that sees the user's groups, and leaves the optimizer with the split ones."""

        def around() -> Any:
            with torch.no_grad():
                self._leave()  # a closure that is called again
            try:
                result = closure()
            except BaseException:
                self._depth = 0  # the step ends here, and no hook will be told
                raise
            with torch.no_grad():
                self._enter()
            return result

        return around

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self.young.commit()
            self.groups.leave()

    @torch.no_grad()
    def _give_back_first(self, *_: Any) -> None:
        self._leave()

    # ------------------------------------------------------------------ factors

    def _scales(self) -> dict[int, float]:
        """Return the factors on learning rates by the ids of parameters, where they are not 1."""
        scales = {}
        factors = {key: weight.inactive.step_scale(weight, self._exponent) for key, weight in self._weights.items()}
        for index, group in enumerate(self.optimizer.param_groups):
            scaled = [key for key in map(id, group["params"]) if factors.get(key, 1.0) != 1.0]
            if scaled and self._can_scale(index, group):
                scales.update({key: factors[key] for key in scaled})
        return scales

    def _can_scale(self, index: int, group: Group) -> bool:
        """Whether the weights of a group can be scaled; a new group is tried, and noted if they cannot."""
        if self._exponent == 0.0:
            return False
        if index in self._reasons:
            return not self._reasons[index]
        held = [self._weights[id(p)] for p in group["params"] if id(p) in self._weights]
        held = [weight for weight in held if not weight.inactive.act_in_forward]
        if not held:
            return False  # not to be remembered: a group may get its first parameters later
        dims = held[0].parameter.dim()
        parameters = [weight.parameter for weight in held if weight.parameter.dim() == dims]
        settings = repr((_settings(group), dims, parameters[0].dtype, parameters[0].device))
        if settings not in self._reasons_by_settings:
            try_it = partial(why_not_scaled, self.optimizer, index, parameters, parameters[0])
            reason = _reasons.recall(self.optimizer, index, parameters[0], try_it, len(parameters[:2]))
            self._reasons_by_settings[settings] = reason
        self._reasons[index] = reason = self._reasons_by_settings[settings]
        if reason:
            for weight in held:
                _add_note(weight, f"steps not scaled by density: {reason}")
        return not reason

    # ------------------------------------------------------------------ counts of steps

    def _count_units(self) -> None:
        """Find for how long grown units need a count of their own, of weights that the optimizer holds since the last.

        If that cannot be given to them, their weight's `note` says why.
        """
        if not self._uncounted:
            return
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                weight = self._uncounted.pop(id(parameter), None)
                if weight is None:
                    continue
                counts = unit_counts(self.optimizer, index, parameter)
                lifetime = 0 if agree([weight.shard], not counts.lifetime) else counts.lifetime
                if lifetime:  # another optimizer that holds it, such as one of an inner loop, may count no steps
                    self.counted[id(parameter)] = weight
                    weight.young.live(lifetime, own_state=counts.own_state)
                if counts.why_not:
                    _add_note(weight, f"grown weights share its count of steps: {counts.why_not}")


def _add_note(weight: MaskedWeight, note: str) -> None:
    if note not in weight.note:
        weight.note = "; ".join(filter(None, (weight.note, note)))


def _settings(group: Group) -> list[tuple[str, str]]:
    """Return what a group is set to, but its learning rate."""
    rate = group.get("lr")
    kept = {key: repr(group[key]) for key in group.keys() - {"params", "param_names"} if "lr" not in key}
    return sorted((kept | {"lr": type(rate).__name__}).items())


def _needs_counts(optimizer: Optimizer) -> bool:
    groups = [(index, group["params"]) for index, group in enumerate(optimizer.param_groups) if group["params"]]
    return any(unit_counts(optimizer, index, held[0]) != UnitCounts() for index, held in groups)


def _holds_part(outer: Optimizer, optimizer: Optimizer) -> bool:
    """Whether an optimizer steps this rank's part of what an outer one holds, as in a ZeroRedundancyOptimizer."""
    inner = with_step_hooks(outer)[1:]
    if all(optimizer is not other for other in inner):
        return False
    held = {id(parameter) for other in inner for parameter in parameters_of(other)}  # by all: they may share the work
    return _delegates(outer, optimizer) and len(held) < len(parameters_of(outer))


def _delegates(optimizer: Optimizer, inner: Optimizer) -> bool:
    """Whether an optimizer's groups are stepped by an inner one: each group by the inner one's with its index, or part.

    The inner optimizer of a ZeroRedundancyOptimizer holds this rank's part of each group, which may be empty; the outer
    one copies settings from group to group by their indices.
    """
    return len(inner.param_groups) == len(optimizer.param_groups) and all(
        {id(p) for p in theirs["params"]} <= {id(p) for p in ours["params"]}
        for theirs, ours in zip(inner.param_groups, optimizer.param_groups, strict=True)
    )
