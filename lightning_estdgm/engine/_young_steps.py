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
from lightning_estdgm.engine._young_units import YoungUnits


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
        _write(self._shown)
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
        self._weight = weight
        self.cohorts = weight.young.cohorts
        self.whole: Mapping[str, Any] = optimizer.state.get(weight.parameter, {})
        self._elements = weight.young.elements
        self._sizes = [len(cohort.elements) for cohort in self.cohorts]
        gradient = weight.gradient
        self.values = self._taken(weight.weight)
        self.gradients = None if gradient is None else self._taken(gradient)
        self.entries = {
            key: self._taken(oriented(value, weight)) for key, value in self.whole.items() if _has_part(value)
        }

    def put_values(self, pieces: Sequence[Tensor]) -> None:
        """Write each cohort's part of the weight."""
        self._put(self._weight.weight, pieces)

    def put_entry(self, key: str, pieces: Sequence[Tensor]) -> None:
        """Write each cohort's part of a state entry."""
        self._put(oriented(self.whole[key], self._weight), pieces)

    def _taken(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return each cohort's part of a tensor; none of its elements for a cohort that has none on this rank."""
        memory, places = _in_memory(tensor, self._elements)
        return memory.index_select(0, places).split(self._sizes)

    def _put(self, tensor: Tensor, pieces: Sequence[Tensor]) -> None:
        memory, places = _in_memory(tensor, self._elements)
        memory.scatter_(0, places, torch.cat(list(pieces)))


class _Shown:
    """One parameter for the cohorts of several weights that have the same numbers, and so take the same steps.

    Attributes:
        parameter: the parameter, one zero if no cohort has an element on this rank.
        members: part and place in it of each cohort.

    """

    def __init__(self, optimizer: Optimizer, members: Sequence[tuple[_Part, int]]) -> None:
        self._optimizer, self.members = optimizer, members
        self._sizes = [len(part.values[i]) for part, i in members]
        self.parameter = nn.Parameter(self._joined([part.values[i] for part, i in members]))
        gradients = [part.gradients[i] for part, i in members if part.gradients is not None]
        if gradients:
            self.parameter.grad = self._joined(gradients)
        first, i = members[0]
        if own := first.cohorts[i].numbers:  # else the optimizer makes its state, as it does for a fresh parameter
            numbers = {key: _beside(value, first.whole.get(key)) for key, value in own.items()}
            entries = {key: self._joined([part.entries[key][j] for part, j in members]) for key in first.entries}
            optimizer.state[self.parameter] = entries | numbers

    @property
    def state(self) -> Mapping[str, Any]:
        """What the optimizer has for the parameter."""
        state: Mapping[str, Any] = self._optimizer.state.get(self.parameter, {})
        return state

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the elements of each member of a tensor with the parameter's elements."""
        vector = tensor.detach().view(-1)
        return iter(vector[: sum(self._sizes)].split(self._sizes))

    @staticmethod
    def _joined(pieces: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
        return whole if len(whole) else whole.new_zeros(1)


def _shown(optimizer: Optimizer, weights: Sequence[SteppedWeight]) -> list[_Shown]:
    """Return parameters for all cohorts of weights of one group: one for those whose numbers are equal."""
    slots: dict[Any, list[list[tuple[_Part, int]]]] = {}
    for part in [_Part(optimizer, weight) for weight in weights]:
        kind = tuple((key, pieces[0].dtype) for key, pieces in part.entries.items())
        for i, cohort in enumerate(part.cohorts):
            key = (cohort.age, part.values[i].dtype, part.values[i].device, kind)
            for slot in slots.setdefault(key, []):
                first = slot[0][0].cohorts[slot[0][1]]
                if _same_numbers(first.numbers, cohort.numbers):
                    cohort.numbers = first.numbers  # which is seen at once in the next step
                    slot.append((part, i))
                    break
            else:
                slots[key].append([(part, i)])
    return [_Shown(optimizer, slot) for same in slots.values() for slot in same]


def _write(shown: Sequence[_Shown]) -> None:
    """Write values and state over those of the whole weights; numbers are kept by the cohorts."""
    values: dict[_Part, dict[int, Tensor]] = {}
    entries: dict[_Part, dict[str, dict[int, Tensor]]] = {}
    for one in shown:
        state = one.state
        numbers = _numbers(state)
        for (part, i), piece in zip(one.members, one.pieces(one.parameter), strict=True):
            values.setdefault(part, {})[i] = piece
            part.cohorts[i].numbers = numbers
        for key, value in state.items():
            if _has_part(value):
                for (part, i), piece in zip(one.members, one.pieces(value), strict=True):
                    entries.setdefault(part, {}).setdefault(key, {})[i] = piece
    for part, pieces in values.items():
        part.put_values([pieces[i] for i in range(len(part.cohorts))])
        for key, own in entries.get(part, {}).items():
            if _has_part(part.whole.get(key)) and len(own) == len(part.cohorts):
                part.put_entry(key, [own[i] for i in range(len(part.cohorts))])


def _in_memory(tensor: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the memory that a tensor spans, as a vector, and the places in it of elements of the flattened tensor.

    A vector is read and written in half the time of ``take`` and ``put_``, and with deterministic algorithms, too.
    """
    if tensor.is_contiguous():
        return tensor.view(-1), elements
    places, inner = torch.zeros_like(elements), 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        places += (elements // inner % size) * stride
        inner *= size
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,)), places


def _has_part(value: Any) -> bool:
    """Whether a state entry has an element for each of the weight's; else it is a number."""
    return isinstance(value, Tensor) and value.dim() > 0


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not _has_part(value)}


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
