"""Counters of a fit's work, to which its joules are related: optimizer steps, samples, and units of the user's own."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.engine._hooked_optimizers import parameters_of, with_step_hooks


class StepCounter:
    """Number of optimizer steps in which a parameter had a gradient.

    Steps are counted by torch's hooks on an optimizer or on those that it wraps; nested steps count once. If none of
    them runs hooks, each call of `note_gradients` counts as a step. A wrapper that steps several optimizers, or one
    several times, makes one step for each call of `note_gradients`.

    Args:
        optimizers: Optimizers to watch.

    Attributes:
        steps: Number of steps so far.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        self.steps = 0
        self._depth = 0  # number of nested steps that have begun and not ended
        self._had_gradients = False  # before the current step, which may clear them
        self._told = False  # whether `note_gradients` was called in this batch
        self._hooks: list[Any] = []
        self._optimizers: list[Any] = []
        self._seen: set[int] = set()  # ids of the optimizers whose steps run hooks
        self._watch(optimizers)

    def note_gradients(self, optimizer: Any) -> None:
        """Note that `optimizer` has its gradients and steps next."""
        self._told = True
        if not _has_gradients(optimizer):
            return
        if id(optimizer) in self._seen:
            self._had_gradients = True
        else:
            self.steps += 1

    def begin_batch(self, optimizers: Sequence[Any]) -> None:
        """Forget a noted step that was not made, as when a GradScaler skips it.

        Args:
            optimizers: Current optimizers of the fit, which a callback may have replaced.
        """
        self._had_gradients = self._told = False
        self._depth = 0
        if len(optimizers) != len(self._optimizers) or any(map(operator.is_not, optimizers, self._optimizers)):
            self.close()
            self._watch(optimizers)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, optimizers: Iterable[Any]) -> None:
        self._optimizers = list(optimizers)
        self._seen = set()
        hooked: dict[int, Any] = {}  # each once, though several wrappers may hold it
        for optimizer in self._optimizers:
            inner = with_step_hooks(optimizer)
            hooked.update((id(each), each) for each in inner)
            if inner:
                self._seen.add(id(optimizer))
        for each in hooked.values():
            self._hooks += [each.register_step_pre_hook(self._before), each.register_step_post_hook(self._after)]

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            # Lightning steps the optimizer also where training_step returned None; no gradient, no step.
            by_itself = not self._told or any(optimizer is each for each in self._optimizers)
            self.steps += self._had_gradients or (by_itself and _has_gradients(optimizer))
            self._had_gradients = False


def _has_gradients(optimizer: Any) -> bool:
    """Return whether a parameter of the optimizer has a gradient; True where its parameters cannot be told."""
    try:
        return any(parameter.grad is not None for parameter in parameters_of(optimizer))
    except (AttributeError, KeyError, TypeError):  # a wrapper that is no Optimizer may show none
        return True


class BatchCounter:
    """Number of samples, and of units of the user's own, in the training batches.

    Args:
        per: By unit, a function of the batch that returns its number; "sample" replaces the batch size that all
            tensors of the batch agree on.
        counting: False where another rank counts the same batches.

    Attributes:
        counts: Numbers so far, by unit; None where a batch's number is unknown.
        batch_size: Size of the first batch whose size is known.
    """

    def __init__(self, per: Mapping[str, Callable[[Any], int]], *, counting: bool) -> None:
        self._per: dict[str, Callable[[Any], int | None]] = {"sample": batch_size, **per}
        self._counting = counting
        self.counts: dict[str, int | None] = dict.fromkeys(self._per, 0)
        self.batch_size: int | None = None

    def count(self, batch: Any) -> None:
        """Count one batch.

        Raises:
            TypeError: A function of the user's returned no whole number.
            ValueError: It returned a negative one.
        """
        if self.batch_size is None:
            self.batch_size = batch_size(batch)
        if not self._counting:
            return
        for unit, function in self._per.items():
            so_far, number = self.counts[unit], function(batch)
            if number is not None or function is not batch_size:
                number = _check_count(unit, number)
            self.counts[unit] = None if so_far is None or number is None else so_far + number


def check_per(per: Any) -> dict[str, Callable[[Any], int]]:
    """Return the argument `per` of `EnergyMonitor` as a dict.

    Raises:
        TypeError: It is no mapping to functions.
        ValueError: A unit is no lower-case name, or is "step".
    """
    if per is None:
        return {}
    if not isinstance(per, Mapping):
        raise TypeError(f"per must map units to functions of the batch, got {per!r}")
    for unit, count in per.items():
        if not (isinstance(unit, str) and re.fullmatch("[a-z][a-z0-9_]*", unit)) or unit == "step":
            raise ValueError(f"per: a unit is a lower-case name other than 'step', got {unit!r}")
        if not callable(count):
            raise TypeError(f"per[{unit!r}] must be a function of the batch, got {count!r}")
    return dict(per)


def batch_size(batch: Any) -> int | None:
    """Return the length that all tensors of a batch share along their first dimension; None if there is none.

    Lightning's own `extract_batch_size` takes the first tensor's and warns where others differ: a guess that
    would make a wrong figure here.
    """
    sizes: set[int] = set()
    queue = [batch]
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            if item.ndim:
                sizes.add(item.size(0))  # a nested tensor has no shape
        elif isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
    return sizes.pop() if len(sizes) == 1 else None


def _check_count(unit: str, number: Any) -> int:
    try:
        whole = operator.index(number)
    except TypeError:
        raise TypeError(f"per[{unit!r}] must return a whole number, got {number!r}") from None
    if whole < 0:
        raise ValueError(f"per[{unit!r}] must return a number of at least 0, got {whole}")
    return whole
