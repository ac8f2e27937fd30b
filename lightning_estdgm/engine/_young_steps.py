"""`YoungSteps`: an optimizer steps the young units of its weights as parameters of their own.

For the length of a step, the optimizer sees one more group for each of its groups that holds young units. Each cohort
is a parameter there: a copy of its part of the weight, of the gradient and of the state, with a count of steps of its
own. After the step, values and state are written over what the optimizer has made of the whole weight. So whatever an
optimizer derives from its count, and whatever is changed in the group, young units have what a fresh parameter would
have. Which optimizers can be treated so is found out in `_count_trial`.
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
        self._parts: list[_Part] = []
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
            parts = [_Part(self._optimizer, weight) for weight in self._stepped(group, weights)]
            if parts:
                own = {key: value for key, value in group.items() if key != "param_names"}
                self._groups.append(own | {"params": [p for part in parts for p in part.parameters]})
                self._parts += parts
        self._optimizer.param_groups.extend(self._groups)

    def commit(self) -> None:
        """Take the young units away after a step, and write what the optimizer made of them. May be called twice."""
        for part in self._parts:
            part.write()
        self.discard()

    def discard(self) -> None:
        """Take the young units away, as where no step was made."""
        shown = {id(group) for group in self._groups}
        groups = self._optimizer.param_groups
        if shown:
            groups[:] = [group for group in groups if id(group) not in shown]
        for part in self._parts:
            part.forget()
        self._parts, self._groups = [], []

    def _stepped(self, group: Mapping[str, Any], weights: Mapping[int, SteppedWeight]) -> Iterator[SteppedWeight]:
        for parameter in group["params"]:
            weight = weights.get(id(parameter))
            if weight is None or not weight.young.cohorts:
                continue
            if weight.gradient is not None and self._optimizer.state.get(parameter):
                yield weight


class _Part:
    """The young units of one weight as parameters.

    Attributes:
        parameters: one for each cohort.

    """

    def __init__(self, optimizer: Optimizer, weight: SteppedWeight) -> None:
        self._optimizer, self._weight = optimizer, weight
        self._cohorts, self._elements = weight.young.cohorts, weight.young.elements
        self._sizes = [len(cohort.elements) for cohort in self._cohorts]
        self.parameters = [nn.Parameter(values) for values in self._taken(weight.weight)]
        if (gradient := weight.gradient) is not None:
            for parameter, own in zip(self.parameters, self._taken(gradient), strict=True):
                parameter.grad = own
        self._share_state()

    def _share_state(self) -> None:
        """Give all cohorts but the newest a state: their part of the whole one, and numbers of their own."""
        whole = self._whole
        entries = {key: self._taken(oriented(value, self._weight)) for key, value in whole.items() if _has_part(value)}
        for i, (parameter, cohort) in enumerate(zip(self.parameters, self._cohorts, strict=True)):
            if cohort.numbers:  # else the optimizer makes its state, as it does for a fresh parameter
                numbers = {key: _beside(value, whole.get(key)) for key, value in cohort.numbers.items()}
                self._optimizer.state[parameter] = {key: values[i] for key, values in entries.items()} | numbers

    def write(self) -> None:
        """Write values and state over those of the whole weight; numbers are kept by the cohorts."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self.parameters]
        self._put(self._weight.weight, self.parameters)
        for key, value in self._whole.items():
            if _has_part(value) and all(key in state for state in states):
                self._put(oriented(value, self._weight), [state[key] for state in states])
        for cohort, state in zip(self._cohorts, states, strict=True):
            cohort.numbers = _numbers(state)

    def forget(self) -> None:
        """Remove the parameters' state from the optimizer."""
        for parameter in self.parameters:
            self._optimizer.state.pop(parameter, None)

    @property
    def _whole(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._optimizer.state.get(self._weight.parameter, {})
        return state

    def _taken(self, tensor: Tensor) -> list[Tensor]:
        """Return each cohort's part of a tensor; one zero for a cohort that has none on this rank."""
        memory, places = _in_memory(tensor, self._elements)
        pieces = memory.index_select(0, places).split(self._sizes)
        return [piece if len(piece) else piece.new_zeros(1) for piece in pieces]

    def _put(self, tensor: Tensor, pieces: Sequence[Tensor]) -> None:
        """Write each cohort's part of a tensor."""
        values = torch.cat([p.detach().view(-1)[:size] for p, size in zip(pieces, self._sizes, strict=True)])
        memory, places = _in_memory(tensor, self._elements)
        memory.scatter_(0, places, values)


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


def _beside(number: Any, whole: Any) -> Any:
    """Return a number, on the device of the whole weight's."""
    if isinstance(number, Tensor) and isinstance(whole, Tensor):
        return number.to(whole.device)
    return number
