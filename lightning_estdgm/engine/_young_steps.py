"""`YoungSteps`: an optimizer steps the young units of its weights as parameters of their own.

For the length of a step, the optimizer sees one more group for each of its groups that holds young units. The cohorts
of one age, of all weights in the group, are one parameter there: a copy of their parts of the weights, of the gradients
and of the state, with a count of steps of its own. (Weights whose rates are scaled differently are in groups of their
own, see `_scaled_groups`.) After the step, values and state are written over what the optimizer has made of the whole
weights. So whatever an optimizer derives from its count, and whatever is changed in the group, young units have what a
fresh parameter would have. Which optimizers can be treated so is found out in `_count_trial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.engine._state_rules import oriented
from lightning_estdgm.engine._young_units import Cohort, YoungUnits


class SteppedWeight(Protocol):
    """A weight and its young units; see `MaskedWeight`."""

    young: YoungUnits

    @property
    def shard(self) -> Shard:
        """Layout of the weight over ranks."""
        ...

    @property
    def parameter(self) -> Tensor:
        """The weight as the optimizer holds it."""
        ...

    @property
    def weight(self) -> Tensor:
        """The local part of the weight."""
        ...

    @property
    def gradient(self) -> Tensor | None:
        """The local part of the gradient."""
        ...


class YoungSteps:
    """Steps of the young units that one optimizer holds, from `enter` to `commit` or `discard`.

    Args:
        optimizer: optimizer whose own step moves the weights.

    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._shown: list[_Shown] = []
        self._groups: list[dict[str, Any]] = []

    @property
    def entered(self) -> bool:
        """Whether the optimizer sees young units as parameters of their own."""
        return bool(self._groups)

    def enter(self, weights: Mapping[int, SteppedWeight]) -> None:
        """Show the optimizer the young units that have gradients.

        Args:
            weights: weights that it may hold, by the id of their parameters.

        """
        self.discard()
        for group in self._optimizer.param_groups:
            shown = _shown(self._optimizer, list(self._stepped(group, weights)))
            if shown:
                own = {key: value for key, value in group.items() if key != "param_names"}
                self._groups.append(own | {"params": [one.parameter for one in shown]})
                self._shown += shown
        self._optimizer.param_groups.extend(self._groups)

    def commit(self) -> None:
        """Take the young units away after a step, and write what the optimizer made of them. May be called twice."""
        for one in self._shown:
            one.write()
        self.discard()

    def discard(self) -> None:
        """Take the young units away, as where no step was made."""
        shown = {id(group) for group in self._groups}
        groups = self._optimizer.param_groups
        if shown:
            groups[:] = [group for group in groups if id(group) not in shown]
        for one in self._shown:
            self._optimizer.state.pop(one.parameter, None)
        self._shown, self._groups = [], []

    def _stepped(self, group: Mapping[str, Any], weights: Mapping[int, SteppedWeight]) -> Iterator[SteppedWeight]:
        for parameter in group["params"]:
            weight = weights.get(id(parameter))
            if weight is None or not weight.young.cohorts:
                continue
            if weight.gradient is not None and self._optimizer.state.get(parameter):
                yield weight


class _Part:
    """The young units of one weight: what is read of its tensors before a step, and written after it."""

    def __init__(self, optimizer: Optimizer, weight: SteppedWeight) -> None:
        self.cohorts, self.own_state = weight.young.cohorts, weight.young.own_state
        self.whole: Mapping[str, Any] = optimizer.state.get(weight.parameter, {})
        self.values, self.gradients = weight.weight, weight.gradient
        self.entries = {key: oriented(value, weight) for key, value in self.whole.items() if _has_part(value)}


class _Shown:
    """One parameter for the cohorts of several weights that have the same numbers, and so take the same steps.

    Attributes:
        parameter: the parameter, one zero if no cohort has an element on this rank.
        members: part and place in it of each cohort.

    """

    def __init__(self, optimizer: Optimizer, members: Sequence[tuple[_Part, int]]) -> None:
        self._optimizer, self.members = optimizer, members
        self._cohorts = [part.cohorts[i] for part, i in members]
        self._writes_state = any(part.own_state for part, _ in members)
        self.parameter = nn.Parameter(self._joined([part.values for part, _ in members]))
        gradients = [part.gradients for part, _ in members if part.gradients is not None]
        if gradients:
            self.parameter.grad = self._joined(gradients)
        first, i = members[0]
        if own := first.cohorts[i].numbers:  # else the optimizer makes its state, as it does for a fresh parameter
            numbers = {key: _beside(value, first.whole.get(key)) for key, value in own.items()}
            entries = {key: self._joined([part.entries[key] for part, _ in members]) for key in first.entries}
            optimizer.state[self.parameter] = entries | numbers

    def write(self) -> None:
        """Write values and state over those of the whole weights; numbers are kept by the cohorts."""
        state: Mapping[str, Any] = self._optimizer.state.get(self.parameter, {})
        numbers = {key: value for key, value in state.items() if not _has_part(value)}
        self._put(self.parameter, [part.values for part, _ in self.members])
        for key, value in state.items():
            if _has_part(value) and self._writes_state and all(key in part.entries for part, _ in self.members):
                self._put(value, [part.entries[key] for part, _ in self.members])
        for cohort in self._cohorts:
            cohort.numbers = numbers

    def _joined(self, wholes: Sequence[Tensor]) -> Tensor:
        """Return the elements of all members, one after the other; a zero if there are none on this rank."""
        size = sum(map(_size, self._cohorts))
        if not size:
            return wholes[0].new_zeros(1)
        vector = wholes[0].new_empty(size)
        for piece, whole, cohort in zip(self._pieces(vector), wholes, self._cohorts, strict=True):
            memory, places = _in_memory(whole, cohort)
            torch.index_select(memory, 0, places, out=piece.view(-1, *memory.shape[1:]))
        return vector

    def _put(self, tensor: Tensor, wholes: Sequence[Tensor]) -> None:
        for piece, whole, cohort in zip(self._pieces(tensor.detach().view(-1)), wholes, self._cohorts, strict=True):
            memory, places = _in_memory(whole, cohort)
            if memory.dim() == 1:
                memory.scatter_(0, places, piece)
            else:
                memory.index_copy_(0, places, piece.view(-1, memory.shape[1]))

    def _pieces(self, vector: Tensor) -> Sequence[Tensor]:
        sizes = list(map(_size, self._cohorts))
        return vector[: sum(sizes)].split(sizes)


def _shown(optimizer: Optimizer, weights: Sequence[SteppedWeight]) -> list[_Shown]:
    """Return parameters for all cohorts of weights of one group: one for those whose numbers are equal."""
    slots: dict[Any, list[list[tuple[_Part, int]]]] = {}
    for part in [_Part(optimizer, weight) for weight in weights]:
        kind = tuple((key, entry.dtype) for key, entry in part.entries.items())
        for i, cohort in enumerate(part.cohorts):
            key = (cohort.age, part.values.dtype, part.values.device, kind)
            for slot in slots.setdefault(key, []):
                first = slot[0][0].cohorts[slot[0][1]]
                if _same_numbers(first.numbers, cohort.numbers):
                    cohort.numbers = first.numbers  # which is seen at once in the next step
                    slot.append((part, i))
                    break
            else:
                slots[key].append([(part, i)])
    return [_Shown(optimizer, slot) for same in slots.values() for slot in same]


def _size(cohort: Cohort) -> int:
    return len(cohort.elements) * cohort.run


def _in_memory(tensor: Tensor, cohort: Cohort) -> tuple[Tensor, Tensor]:
    """Return the memory that a tensor spans, as rows where elements lie in runs, and the places of a cohort's in it.

    A vector is read and written in half the time of ``take`` and ``put_``, rows in a tenth; and with deterministic
    algorithms, too.
    """
    elements, run = cohort.elements.long(), cohort.run
    if tensor.is_contiguous():
        return (tensor.view(-1) if run == 1 else tensor.view(-1, run)), elements
    if run > 1:
        elements = (elements[:, None] * run + torch.arange(run, device=elements.device)).flatten()
    places, inner = torch.zeros_like(elements), 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        places += (elements // inner % size) * stride
        inner *= size
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,)), places


def _has_part(value: Any) -> bool:
    """Whether a state entry has an element for each of the weight's; else it is a number."""
    return isinstance(value, Tensor) and value.dim() > 0


def _same_numbers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two counts are the same; after a step that was theirs they are one object."""
    return one is other or (one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items()))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and bool(one.cpu() == other.cpu())
    return type(one) is type(other) and bool(one == other)


def _beside(number: Any, whole: Any) -> Any:
    """Return a copy of a number, which a step may write into, on the device of the whole weight's."""
    if not isinstance(number, Tensor):
        return number
    return number.to(whole.device, copy=True) if isinstance(whole, Tensor) else number.clone()
