"""`UnitViews`: a weight whose units lie by age in its parameter, as parameters of its cohorts and of its other units.

An optimizer that steps these instead of the parameter steps each unit once, by the count of its own; nothing is copied.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.engine._young_units import Cohort, YoungUnits

_FEW = 1 << 10  # elements of a cohort that are copied sooner than a parameter more is stepped


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


class UnitViews:
    """Views of one weight, kept from step to step for as long as its memory and its cohorts are the same.

    Args:
        optimizer: optimizer that steps the weight, of which it has a state.
        weight: weight.
        living: its young cohorts, the oldest first.

    Attributes:
        settled: view of the units that are not young.
        young: views of large cohorts.
        left: small cohorts, which are not viewed.

    """

    def __init__(self, optimizer: Optimizer, weight: SteppedWeight, living: Sequence[Cohort]) -> None:
        values, size = weight.weight, unit_size(weight.weight)
        self._living = len(living)
        self._whole: dict[str, Any] = optimizer.state[weight.parameter]
        self._entries = {key: value for key, value in self._whole.items() if has_part(value)}
        self._memory = self._addresses(weight)
        counts = [living[0].start, *[len(cohort.units) for cohort in living]]
        self._runs = [count * _run(values, size) for count in counts]
        self.settled = UnitsView(self._whole, values, 0, counts[0], None)
        self.left = [cohort for cohort in living if len(cohort.units) * size < _FEW]
        views = [
            UnitsView(self._whole, values, cohort.start, len(cohort.units), cohort)
            if len(cohort.units) * size >= _FEW
            else None
            for cohort in living
        ]
        self.young = [view for view in views if view is not None]
        self._in_order = [self.settled, *views]

    @classmethod
    def of(cls, optimizer: Optimizer, weight: SteppedWeight, living: Sequence[Cohort]) -> UnitViews:
        """Return the views of the last step if they are still right; else new ones."""
        found: UnitViews | None = weight.young.views
        if found is None or not found._are_of(optimizer, weight, living):
            found = weight.young.views = cls(optimizer, weight, living)
        return found

    def show(self, optimizer: Optimizer, gradient: Tensor) -> None:
        """Give the views their parts of the weight's gradient, and their states."""
        for view, part in zip(self._in_order, gradient.split(self._runs), strict=True):
            if view is not None:
                view.show(optimizer, part)

    def _are_of(self, optimizer: Optimizer, weight: SteppedWeight, living: Sequence[Cohort]) -> bool:
        return (
            self._living == len(living)
            and optimizer.state[weight.parameter] is self._whole
            and all(self._whole.get(key) is entry for key, entry in self._entries.items())
            and self._memory == self._addresses(weight)
        )

    def _addresses(self, weight: SteppedWeight) -> list[int]:
        return [weight.parameter.data_ptr(), *[entry.data_ptr() for entry in self._entries.values()]]


class UnitsView:
    """One parameter for units of one weight that lie side by side.

    Args:
        whole: the optimizer's state of the weight.
        values: the weight.
        start: first unit.
        count: number of units. If there is none, the parameter is a zero, by which the weight's count goes on.
        cohort: the cohort; ``None``: the units are not young, so their numbers are those of the weight.

    Attributes:
        parameter: the parameter.

    """

    def __init__(self, whole: dict[str, Any], values: Tensor, start: int, count: int, cohort: Cohort | None) -> None:
        self._whole, self._values, self._cohort = whole, values, cohort
        self._start, self._count, self._size = start, count, unit_size(values)
        self.parameter = nn.Parameter(self._piece(values))
        self._entries = {key: self._piece(value.detach()) for key, value in whole.items() if has_part(value)}
        if cohort is not None:
            cohort.numbers = {key: beside(value, whole.get(key)) for key, value in cohort.numbers.items()}
        self._of: tuple[Any, ...] = ()  # what the state that was shown is made of, beside `_entries`
        self._state: dict[str, Any] = {}  # that state, which is shown again while it is made of the same
        self._shown: tuple[Any, ...] = ()  # its values then

    def show(self, optimizer: Optimizer, gradient: Tensor) -> None:
        """Give the parameter its part of the weight's gradient, and its state."""
        self.parameter.grad = gradient if self._count else self._piece(gradient)
        numbers = self._whole if self._cohort is None else self._cohort.numbers
        if not numbers:  # the optimizer makes its state, as it does for a fresh parameter
            return
        if not _are(self._of, numbers):
            self._of, self._state = tuple(numbers.values()), {**numbers, **self._entries}
            self._shown = tuple(self._state.values())
        optimizer.state[self.parameter] = self._state

    def write(self, optimizer: Optimizer) -> None:
        """Write the state that the optimizer has made anew; numbers are kept by the cohort, or the weight."""
        state = optimizer.state.get(self.parameter, {})
        if state is self._state and _are(self._shown, state):  # changed in place, if at all
            return
        self._of = ()
        numbers: dict[str, Any] = {}
        for key, value in state.items():
            if value is self._entries.get(key):
                continue
            if not has_part(value):
                numbers[key] = value
            else:
                if key not in self._whole:
                    self._whole[key] = value.new_zeros(self._values.shape)
                self._piece(self._whole[key]).copy_(value)
        if self._cohort is None:
            self._whole.update(numbers)
        else:
            self._cohort.numbers = numbers

    def _piece(self, tensor: Tensor) -> Tensor:
        if not self._count:
            return tensor.new_zeros(1, *tensor.shape[1:])
        return piece(tensor, self._start, self._count, self._size)


def _are(values: tuple[Any, ...], state: Mapping[str, Any]) -> bool:
    """Whether these are the values of a state, by identity."""
    return len(values) == len(state) and all(map(operator.is_, values, state.values()))


def unit_size(values: Tensor) -> int:
    """Return the number of elements of a unit of a weight of which units lie one after the other."""
    return values.numel() // max(1, values.shape[0])


def piece(tensor: Tensor, start: int, count: int, size: int) -> Tensor:
    """Return a view of units, which lie one after the other in a weight or an entry of its state, also a flat one."""
    run = _run(tensor, size)
    return tensor.narrow(0, start * run, count * run)


def _run(tensor: Tensor, size: int) -> int:
    """Return how many of the outermost elements a unit takes."""
    return size if tensor.dim() == 1 else 1


def has_part(value: Any) -> bool:
    """Whether a state entry has an element for each of the weight's; else it is a number."""
    return isinstance(value, Tensor) and value.dim() > 0


def beside(number: Any, whole: Any) -> Any:
    """Return a copy of a number, which a step may write into, on the device of the whole weight's."""
    if not isinstance(number, Tensor):
        return number
    return number.to(whole.device, copy=True) if isinstance(whole, Tensor) else number.clone()
