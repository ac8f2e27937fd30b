"""`YoungCopies`: young units of several weights, copied for the length of a step into parameters of their own.

The units of one age are one parameter, whatever their weights. Those of one weight are read and written in one pass
over its memory, in the order in which they lie there, whatever their ages: what a step costs depends on how many young
elements there are, hardly on how many updates have grown them. Where they lie is kept from step to step.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.engine._state_rules import oriented
from lightning_estdgm.engine._unit_views import SteppedWeight, beside, has_part, unit_size
from lightning_estdgm.engine._young_units import Cohort
from lightning_estdgm.sparse.backends.native._memory import gather_, scatter_


class CopiedWeight:
    """One weight in one step: its tensors, and its cohorts that are copied.

    Args:
        optimizer: optimizer that holds the weight.
        weight: weight.
        gradient: the local part of its gradient.
        cohorts: cohorts that are copied.
        by_age: whether units lie by age in the parameter.

    Attributes:
        entries: entries of its state that have an element for each of its own, laid out as `values`.
        own_state: whether they are written back after the step, too.
        kind: what weights have in common whose units are copied into one parameter.

    """

    def __init__(
        self, optimizer: Optimizer, weight: SteppedWeight, gradient: Tensor, cohorts: Sequence[Cohort], *, by_age: bool
    ) -> None:
        self.weight, self.cohorts = weight, cohorts
        self.values, self.gradient = weight.weight, gradient
        self.whole: Mapping[str, Any] = optimizer.state.get(weight.parameter, {})
        entries = {key: value for key, value in self.whole.items() if has_part(value)}
        self.entries = {key: value.detach() if by_age else oriented(value, weight) for key, value in entries.items()}
        self.own_state = weight.young.own_state or by_age  # there, the weight's own step makes nothing of them
        dtypes = tuple((key, entry.dtype) for key, entry in self.entries.items())
        self.kind = (self.values.dtype, self.values.device, dtypes, self.own_state)

    def elements(self, cohort: Cohort) -> Tensor:
        """Return the elements of a cohort on this rank, as indices into the flattened weight."""
        if cohort.elements is not None:
            return cohort.elements
        size = unit_size(self.values)
        return _range(cohort.start * size, len(cohort.units) * size, self.values.device)


class YoungCopies:
    """Places of the young units of weights of one kind, and the parameters that they are in a step.

    Args:
        parts: weights that are stepped, of one kind.

    Attributes:
        parameters: a parameter for each age, one zero if none of its cohorts has an element on this rank; of the step
            that is under way.

    """

    def __init__(self, parts: Sequence[CopiedWeight]) -> None:
        self.parameters: list[nn.Parameter] = []
        self._parts = parts
        self._members = _joined(parts)  # of each parameter: numbers of parts, and their cohorts
        elements = {id(cohort): part.elements(cohort) for part in parts for cohort in part.cohorts}
        self._sizes: list[int] = []
        ranges: dict[int, Tensor] = {}  # by the id of a cohort: places in the vector of all parameters
        begin = 0
        for members in self._members:
            first = begin
            for _, cohort in members:
                size = len(elements[id(cohort)])
                ranges[id(cohort)] = _range(begin, size, parts[0].values.device)
                begin += size
            self._sizes.append(begin - first)
        in_memory = [torch.cat([elements[id(cohort)] for cohort in part.cohorts]).sort() for part in parts]
        self._places = [places for places, _ in in_memory]  # int32, indices into each flattened weight
        own = [torch.cat([ranges[id(cohort)] for cohort in part.cohorts]) for part in parts]
        self._order = torch.cat([to[order] for to, (_, order) in zip(own, in_memory, strict=True)])  # int32
        self._holders, self._starts = _holders(parts), _starts(parts)

    def take(self, parts: Sequence[CopiedWeight]) -> bool:
        """Go on with the tensors of another step, if it has the same weights, and their cohorts have not changed."""
        holders = _holders(parts)
        is_same = (
            len(holders) == len(self._holders)
            and all(map(operator.is_, holders, self._holders))
            and _starts(parts) == self._starts
            and all(c.numbers is members[0][1].numbers for members in self._members for _, c in members)
        )
        if is_same:
            self._parts = parts
        return is_same

    def show(self, optimizer: Optimizer) -> None:
        """Make the parameters, with their gradients, and their states where they have some."""
        parts = self._parts
        self.parameters = [nn.Parameter(values) for values in self._read([part.values for part in parts])]
        gradients = self._read([part.gradient for part in parts])
        entries = {key: self._read([part.entries[key] for part in parts]) for key in parts[0].entries}
        for i, (parameter, members) in enumerate(zip(self.parameters, self._members, strict=True)):
            parameter.grad = gradients[i]
            first, cohort = members[0]
            if own := cohort.numbers:  # else the optimizer makes its state, as it does for a fresh parameter
                whole = parts[first].whole
                numbers = {key: beside(value, whole.get(key)) for key, value in own.items()}
                optimizer.state[parameter] = {key: entry[i] for key, entry in entries.items()} | numbers

    def write(self, optimizer: Optimizer) -> None:
        """Write values and state over those of the whole weights; numbers are kept by the cohorts."""
        parts = self._parts
        states: list[Mapping[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in self.parameters]
        self._write([part.values for part in parts], self.parameters)
        if parts[0].own_state:
            for key in parts[0].entries:
                self._write([part.entries[key] for part in parts], [state.get(key) for state in states])
        for members, state in zip(self._members, states, strict=True):
            numbers = {key: value for key, value in state.items() if not has_part(value)}
            for _, cohort in members:
                cohort.numbers = numbers

    def forget(self, optimizer: Optimizer) -> None:
        """Free what belongs to one step."""
        for parameter in self.parameters:
            parameter.grad = None
            optimizer.state.pop(parameter, None)
        self.parameters, self._parts = [], ()

    def _read(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Return the elements of each parameter, in views of one vector; a zero for one that has none here."""
        vector = wholes[0].new_empty(len(self._order))
        if not gather_(vector, self._order, wholes, self._places):
            found = [_in_memory(*own) for own in zip(wholes, self._places, strict=True)]
            elements = torch.cat([memory.index_select(0, places) for memory, places in found])
            vector.scatter_(0, self._order.long(), elements)
        pieces = vector.split(self._sizes)
        return [piece if size else vector.new_zeros(1) for piece, size in zip(pieces, self._sizes, strict=True)]

    def _write(self, wholes: Sequence[Tensor], pieces: Sequence[Tensor | None]) -> None:
        """Write the elements of each parameter; those of one without stay as they are."""
        if any(piece is None for piece in pieces):
            present = self._read(wholes)
            pieces = [own if piece is None else piece for own, piece in zip(present, pieces, strict=True)]
        flat = [p.detach().reshape(-1)[:size] for p, size in zip(pieces, self._sizes, strict=True) if p is not None]
        vector = torch.cat(flat)
        if not scatter_(wholes, self._places, vector, self._order):
            elements = vector.index_select(0, self._order.long()).split([len(places) for places in self._places])
            for whole, places, own in zip(wholes, self._places, elements, strict=True):
                memory, found = _in_memory(whole, places)
                memory.scatter_(0, found, own)


def _holders(parts: Sequence[CopiedWeight]) -> list[Any]:
    """Return what tells which units there are: what changes them puts other tensors in place of some of these."""
    return [each for part in parts for c in part.cohorts for each in (part.weight, c, c.units, c.elements)]


def _starts(parts: Sequence[CopiedWeight]) -> list[int]:
    return [cohort.start for part in parts for cohort in part.cohorts]


def _range(start: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + size, dtype=torch.int32, device=device)


def _joined(parts: Sequence[CopiedWeight]) -> list[list[tuple[int, Cohort]]]:
    """Return the cohorts that are joined: those of equal ages and numbers."""
    slots: dict[int, list[list[tuple[int, Cohort]]]] = {}
    for number, part in enumerate(parts):
        for cohort in part.cohorts:
            for slot in slots.setdefault(cohort.age, []):
                first = slot[0][1]
                if _same_numbers(first.numbers, cohort.numbers):
                    cohort.numbers = first.numbers  # which is seen at once in the next step
                    slot.append((number, cohort))
                    break
            else:
                slots[cohort.age].append([(number, cohort)])
    return [slot for same in slots.values() for slot in same]


def _same_numbers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two counts are the same; after a step that was theirs they are one object."""
    return one is other or (one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items()))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and bool(one.cpu() == other.cpu())
    return type(one) is type(other) and bool(one == other)


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
