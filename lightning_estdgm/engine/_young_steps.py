"""`YoungSteps`: an optimizer steps the young units of its weights as parameters of their own.

For the length of a step, the optimizer sees one more group for each of its groups that holds young units. The cohorts
of one age, of all weights in the group, are one parameter there: a copy of their parts of the weights, of the gradients
and of the state, with a count of steps of its own (`_young_copies`). (Weights whose rates are scaled differently are in
groups of their own, see `_scaled_groups`.) After the step, values and state are written over what the optimizer has
made of the whole weights. Where units lie by age in the parameter, nothing is copied but small cohorts: each large one
is a view, and in place of the parameter stands a view of its other units (`_unit_views`). So whatever an optimizer
derives from its count, and whatever is changed in the group, young units have what a fresh parameter would have. Which
optimizers can be treated so is found out in `_count_trial`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_estdgm.engine._unit_views import SteppedWeight, UnitsView, UnitViews
from lightning_estdgm.engine._young_copies import CopiedWeight, YoungCopies
from lightning_estdgm.engine._young_units import Cohort


class YoungSteps:
    """Steps of the young units that one optimizer holds, from `enter` to `commit` or `discard`.

    Args:
        optimizer: optimizer whose own step moves the weights.

    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._views: list[UnitsView] = []
        self._copies: list[YoungCopies] = []
        self._known: dict[int, dict[Any, YoungCopies]] = {}  # by group and kind of weights
        self._groups: list[dict[str, Any]] = []
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []  # groups, and the parameters that they have

    @property
    def entered(self) -> bool:
        """Whether the optimizer sees young units as parameters of their own."""
        return bool(self._groups or self._hidden)

    def enter(self, weights: Mapping[int, SteppedWeight]) -> None:
        """Show the optimizer the young units that have gradients.

        Args:
            weights: weights that it may hold, by the id of their parameters.

        """
        self.discard()
        for index, group in enumerate(self._optimizer.param_groups):
            parts: dict[Any, list[CopiedWeight]] = {}  # by kind
            shown: list[Tensor] = []
            instead: dict[int, Tensor] = {}
            for weight, living, gradient in self._stepped(group, weights):
                by_age = living[0].elements is None
                copied: Sequence[Cohort] = living
                if by_age:
                    found = UnitViews.of(self._optimizer, weight, living)
                    found.show(self._optimizer, gradient)
                    instead[id(weight.parameter)] = found.settled.parameter
                    self._views += [found.settled, *found.young]
                    shown += [view.parameter for view in found.young]
                    copied = found.left
                if copied:
                    part = CopiedWeight(self._optimizer, weight, gradient, copied, by_age=by_age)
                    parts.setdefault(part.kind, []).append(part)
            for copies in self._copied(index, parts):
                shown += copies.parameters
            if shown:
                own = {key: value for key, value in group.items() if key != "param_names"}
                self._groups.append(own | {"params": shown})
            if instead:
                self._hidden.append((group, group["params"]))
                group["params"] = [instead.get(id(parameter), parameter) for parameter in group["params"]]
        self._optimizer.param_groups.extend(self._groups)

    def _copied(self, index: int, parts: Mapping[Any, Sequence[CopiedWeight]]) -> Iterable[YoungCopies]:
        """Return copies for the weights of a group, by kind; those of its last step if they are still right."""
        known = self._known.get(index, {})
        found: dict[Any, YoungCopies] = {}
        for kind, of_kind in parts.items():
            copies = known.get(kind)
            if copies is None or not copies.take(of_kind):
                copies = YoungCopies(of_kind)
            copies.show(self._optimizer)
            found[kind] = copies
        if found:
            self._known[index] = found
            self._copies += found.values()
        return found.values()

    def commit(self) -> None:
        """Take the young units away after a step, and write what the optimizer made of them. May be called twice."""
        for view in self._views:
            view.write(self._optimizer)
        for copies in self._copies:
            copies.write(self._optimizer)
        self.discard()

    def discard(self) -> None:
        """Take the young units away, as where no step was made."""
        shown = {id(group) for group in self._groups}
        groups = self._optimizer.param_groups
        if shown:
            groups[:] = [group for group in groups if id(group) not in shown]
        for group, parameters in self._hidden:
            group["params"] = parameters
        for view in self._views:
            view.parameter.grad = None
            self._optimizer.state.pop(view.parameter, None)
        for copies in self._copies:
            copies.forget(self._optimizer)
        self._views, self._copies, self._groups, self._hidden = [], [], [], []

    def _stepped(
        self, group: Mapping[str, Any], weights: Mapping[int, SteppedWeight]
    ) -> Iterator[tuple[SteppedWeight, list[Cohort], Tensor]]:
        for parameter in group["params"]:
            weight = weights.get(id(parameter))
            if weight is None or not weight.young.cohorts:
                continue
            living, gradient = weight.young.living, weight.gradient
            if not living or gradient is None:
                continue
            if _is_older(living[0], self._optimizer.state.get(parameter)):
                weight.young.let_go(is_sharded=bool(weight.shard.groups))
            else:
                yield weight, living, gradient


def _is_older(cohort: Cohort, state: Mapping[str, Any] | None) -> bool:
    """Whether a weight's state was begun anew since a cohort was grown: there is none, or it counts fewer steps.

    Counts on other devices are not looked at, for which each step would wait.
    """
    if not state:
        return True
    for key, number in cohort.numbers.items():
        own, whole = _read(number), _read(state.get(key))
        if own is not None and whole is not None and whole < own == cohort.age:
            return True
    return False


def _read(number: Any) -> float | None:
    if isinstance(number, Tensor) and number.device.type != "cpu":
        return None
    return float(number) if isinstance(number, Tensor | int | float) else None
