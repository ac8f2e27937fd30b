"""`YoungSteps`: an optimizer steps the young units of its weights as parameters of their own.

For the length of a step, the optimizer sees one more group for each of its groups that holds young units. The cohorts
of one age, of all weights in the group, are one parameter there: a copy of their parts of the weights, of the gradients
and of the state, with a count of steps of its own. (Weights whose rates are scaled differently are in groups of their
own, see `_scaled_groups`.) After the step, values and state are written over what the optimizer has made of the whole
weights. Where units lie by age in the parameter, nothing is copied but small cohorts: each large one is a view, and in
place of the parameter stands a view of its other units (`_unit_views`). So whatever an optimizer derives from its
count, and whatever is changed in the group, young units have what a fresh parameter would have. Which optimizers can be
treated so is found out in `_count_trial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.engine._state_rules import oriented
from lightning_estdgm.engine._unit_views import SteppedWeight, UnitsView, UnitViews, beside, has_part, piece, unit_size
from lightning_estdgm.engine._young_units import Cohort
from lightning_estdgm.sparse.backends.native._memory import gather_, scatter_


class YoungSteps:
    """Steps of the young units that one optimizer holds, from `enter` to `commit` or `discard`.

    Args:
        optimizer: optimizer whose own step moves the weights.

    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._shown: list[_Shown | UnitsView] = []
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
        for group in self._optimizer.param_groups:
            parts: list[_Part] = []
            views: list[UnitsView] = []
            instead: dict[int, Tensor] = {}
            for weight, living, gradient in self._stepped(group, weights):
                by_age = living[0].elements is None
                copied: Sequence[Cohort] = living
                if by_age:
                    found = UnitViews.of(self._optimizer, weight, living)
                    found.show(self._optimizer, gradient)
                    instead[id(weight.parameter)] = found.settled.parameter
                    self._shown.append(found.settled)
                    views += found.young
                    copied = found.left
                if copied:
                    parts.append(_Part(self._optimizer, weight, copied, by_age=by_age))
            shown: list[_Shown | UnitsView] = [*views]
            shown += _shown(self._optimizer, parts)
            self._shown += shown
            if shown:
                own = {key: value for key, value in group.items() if key != "param_names"}
                self._groups.append(own | {"params": [one.parameter for one in shown]})
            if instead:
                self._hidden.append((group, group["params"]))
                group["params"] = [instead.get(id(parameter), parameter) for parameter in group["params"]]
        self._optimizer.param_groups.extend(self._groups)

    def commit(self) -> None:
        """Take the young units away after a step, and write what the optimizer made of them. May be called twice."""
        for one in self._shown:
            one.write(self._optimizer)
        self.discard()

    def discard(self) -> None:
        """Take the young units away, as where no step was made."""
        shown = {id(group) for group in self._groups}
        groups = self._optimizer.param_groups
        if shown:
            groups[:] = [group for group in groups if id(group) not in shown]
        for group, parameters in self._hidden:
            group["params"] = parameters
        for one in self._shown:
            one.parameter.grad = None
            self._optimizer.state.pop(one.parameter, None)
        self._shown, self._groups, self._hidden = [], [], []

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


class _Part:
    """Young units of one weight that are copied: what is read of its tensors before a step, and written after it.

    Args:
        optimizer: optimizer that holds the weight.
        weight: weight.
        cohorts: cohorts that are copied.
        by_age: whether units lie by age in the parameter.

    """

    def __init__(self, optimizer: Optimizer, weight: SteppedWeight, cohorts: Sequence[Cohort], *, by_age: bool) -> None:
        self.cohorts = cohorts
        self.own_state = weight.young.own_state or by_age  # there, the weight's own step makes nothing of them
        self.values, self.gradients = weight.weight, weight.gradient
        self.whole: Mapping[str, Any] = optimizer.state.get(weight.parameter, {})
        entries = {key: value for key, value in self.whole.items() if has_part(value)}
        self.entries = {key: value.detach() if by_age else oriented(value, weight) for key, value in entries.items()}

    def read(self, whole: Tensor, cohort: Cohort, out: Tensor) -> None:
        """Copy the elements of a cohort into a vector."""
        if cohort.elements is None:
            out.copy_(self._piece(whole, cohort).reshape(-1))
        elif not gather_(out, whole, cohort.elements):
            memory, places = _in_memory(whole, cohort.elements)
            torch.index_select(memory, 0, places, out=out)

    def put(self, whole: Tensor, cohort: Cohort, values: Tensor) -> None:
        """Copy a vector over the elements of a cohort."""
        if cohort.elements is None:
            units = self._piece(whole, cohort)
            units.copy_(values.view_as(units))
        elif not scatter_(whole, cohort.elements, values):
            memory, places = _in_memory(whole, cohort.elements)
            memory.scatter_(0, places, values)

    def size(self, cohort: Cohort) -> int:
        """Return the number of elements of a cohort on this rank."""
        return len(cohort.units) * unit_size(self.values) if cohort.elements is None else len(cohort.elements)

    def _piece(self, whole: Tensor, cohort: Cohort) -> Tensor:
        return piece(whole, cohort.start, len(cohort.units), unit_size(self.values))


class _Shown:
    """One parameter for the cohorts of several weights that have the same numbers, and so take the same steps.

    Attributes:
        parameter: the parameter, one zero if no cohort has an element on this rank.
        members: weight and cohort.

    """

    def __init__(self, optimizer: Optimizer, members: Sequence[tuple[_Part, Cohort]]) -> None:
        self.members = members
        self._writes_state = any(part.own_state for part, _ in members)
        self._sizes = [part.size(cohort) for part, cohort in members]
        self.parameter = nn.Parameter(self._joined([part.values for part, _ in members]))
        gradients = [part.gradients for part, _ in members if part.gradients is not None]
        if gradients:
            self.parameter.grad = self._joined(gradients)
        first, cohort = members[0]
        if own := cohort.numbers:  # else the optimizer makes its state, as it does for a fresh parameter
            numbers = {key: beside(value, first.whole.get(key)) for key, value in own.items()}
            entries = {key: self._joined([part.entries[key] for part, _ in members]) for key in first.entries}
            optimizer.state[self.parameter] = entries | numbers

    def write(self, optimizer: Optimizer) -> None:
        """Write values and state over those of the whole weights; numbers are kept by the cohorts."""
        state: Mapping[str, Any] = optimizer.state.get(self.parameter, {})
        numbers = {key: value for key, value in state.items() if not has_part(value)}
        self._put(self.parameter, [part.values for part, _ in self.members])
        for key, value in state.items():
            if has_part(value) and self._writes_state and all(key in part.entries for part, _ in self.members):
                self._put(value, [part.entries[key] for part, _ in self.members])
        for _, cohort in self.members:
            cohort.numbers = numbers

    def _joined(self, wholes: Sequence[Tensor]) -> Tensor:
        """Return the elements of all members, one after the other; a zero if there are none on this rank."""
        size = sum(self._sizes)
        if not size:
            return wholes[0].new_zeros(1)
        vector = wholes[0].new_empty(size)
        for (part, cohort), whole, own in zip(self.members, wholes, self._pieces(vector), strict=True):
            part.read(whole, cohort, own)
        return vector

    def _put(self, tensor: Tensor, wholes: Sequence[Tensor]) -> None:
        pieces = self._pieces(tensor.detach().view(-1))
        for (part, cohort), whole, own in zip(self.members, wholes, pieces, strict=True):
            part.put(whole, cohort, own)

    def _pieces(self, vector: Tensor) -> Sequence[Tensor]:
        return vector[: sum(self._sizes)].split(self._sizes)


def _shown(optimizer: Optimizer, parts: Sequence[_Part]) -> list[_Shown]:
    """Return parameters for the cohorts that are joined, of weights of one group: one for those of equal numbers."""
    slots: dict[Any, list[list[tuple[_Part, Cohort]]]] = {}
    for part in parts:
        kind = tuple((key, entry.dtype) for key, entry in part.entries.items())
        for cohort in part.cohorts:
            key = (cohort.age, part.values.dtype, part.values.device, kind)
            for slot in slots.setdefault(key, []):
                first = slot[0][1]
                if _same_numbers(first.numbers, cohort.numbers):
                    cohort.numbers = first.numbers  # which is seen at once in the next step
                    slot.append((part, cohort))
                    break
            else:
                slots[key].append([(part, cohort)])
    return [_Shown(optimizer, slot) for same in slots.values() for slot in same]


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


def _in_memory(tensor: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the memory that a tensor spans, as a vector, and the places of elements in it.

    A vector is read and written in half the time of ``take`` and ``put_``; and with deterministic algorithms, too.
    """
    elements = elements.long()
    if tensor.is_contiguous():
        return tensor.view(-1), elements
    places, inner = torch.zeros_like(elements), 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        places += (elements // inner % size) * stride
        inner *= size
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,)), places


def _same_numbers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two counts are the same; after a step that was theirs they are one object."""
    return one is other or (one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items()))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and bool(one.cpu() == other.cpu())
    return type(one) is type(other) and bool(one == other)
