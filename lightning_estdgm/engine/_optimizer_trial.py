"""`trial_optimizer`: a copy of an optimizer that holds throw-away parameters, to see what it does with a parameter.

What is looked for in a trial is elsewhere: whether ``lr`` is read per group in `_rate_trial`, what a fresh parameter's
state is in `_state_trial`. No trial touches the optimizer of the run. `TrialMemory` keeps what trials have found.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_estdgm.engine._hooked_optimizers import nested_optimizers

_T = TypeVar("_T")

PLAIN = (bool, int, float, str, tuple, type(None))
"""Types of plain settings."""

_NOT_TRIED = "could not be tried"
_MOST_KEPT = 256
_NO_SETTINGS = ("defaults", "param_groups", "state", "step")  # with torch's hooks: what schedulers and users patch


class TrialMemory(Generic[_T]):
    """Results of one kind of trial, by all that they depend on: a new optimizer of the same settings is not tried.

    A result holds for all of a class if settings are numbers, words, and dicts and lists of these, else for one
    optimizer alone. That an optimizer could not be tried is not kept: memory may have been short.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[weakref.ref[Any], _T]] = {}  # the oldest first

    def recall(self, optimizer: Optimizer, index: int, like: Tensor, make: Callable[[], _T], *more: Any) -> _T:
        """Return the result that is known, or else that of a trial.

        Args:
            optimizer: optimizer that the trial is of.
            index: index of the group.
            like: parameter whose number of dimensions, dtype and device the trial depends on.
            make: makes the trial; what it raises is raised.
            more: what the trial depends on besides, by its representation.

        """
        own = {k: v for k, v in vars(optimizer).items() if k not in _NO_SETTINGS and not k.startswith("_optimizer_")}
        defaults = {k: v for k, v in getattr(optimizer, "defaults", {}).items() if k != "lr"}
        group = {k: v for k, v in optimizer.param_groups[index].items() if k not in ("params", "param_names")}
        rate = group.pop("lr", None)
        settings = (own, defaults, group)
        valid_for: Any = type(optimizer) if _is_plain(settings) else optimizer
        groups = len(optimizer.param_groups)
        key = repr((id(valid_for), settings, groups, type(rate), like.dim(), like.dtype, like.device, more))
        kept = self._known.get(key)
        if kept is not None and kept[0]() is valid_for:
            return kept[1]
        result = make()
        if _NOT_TRIED not in repr(result):
            self._known = {k: kept for k, kept in self._known.items() if kept[0]() is not None}
            if len(self._known) >= _MOST_KEPT:  # settings that change at each step
                self._known.pop(next(iter(self._known)))
            self._known[key] = weakref.ref(valid_for), result
        return result


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN)


def trial_optimizer(optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor]) -> Optimizer:
    """Return a copy of an optimizer, settings, own attributes and inner optimizers included, with other parameters.

    It has no parameter's state and no hooks, and is in training mode where it has modes. Of each group, only the
    parameters with a stand-in are left; other groups are empty, so that groups keep their indices. (``copy.deepcopy``
    would keep what ``Optimizer.__getstate__`` returns: groups and state, without a class's own attributes.)

    Args:
        optimizer: optimizer of a run, or a wrapper of one.
        stand_ins: throw-away parameters, by the parameters that they stand in for.

    Raises:
        Exception: whatever an attribute raises that cannot be copied.

    """
    memo: dict[int, Any] = {}
    nested = nested_optimizers(optimizer)
    for inner in nested:
        memo[id(inner)] = object.__new__(type(inner))
        for group in inner.param_groups:
            for parameter in group["params"]:
                memo[id(parameter)] = stand_ins.get(parameter)
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = inner.__dict__.get(name)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
    for inner in nested:
        # A scheduler's or a user's own `step` on the instance is a function that steps the optimizer of the run.
        own = {name: value for name, value in inner.__dict__.items() if name != "step"}
        if id(inner.state) not in memo:
            kept = {key: value for key, value in inner.state.items() if not isinstance(key, Tensor)}
            memo[id(inner.state)] = defaultdict(dict, copy.deepcopy(kept, memo))
        memo[id(inner)].__dict__.update(copy.deepcopy(own, memo))
    for inner in nested:
        for group in memo[id(inner)].param_groups:  # the same lists, which an optimizer may hold elsewhere, too
            group["params"][:] = [parameter for parameter in group["params"] if parameter is not None]
    trial: Optimizer = memo[id(optimizer)]
    train = getattr(trial, "train", None)
    if callable(train):  # schedule-free optimizers step in this mode only
        train()
    return trial


def added(trial: Optimizer) -> Optimizer:
    """Return a trial to which its groups are added again: of one that makes its state in ``add_param_group``.

    Args:
        trial: copy of an optimizer, see `trial_optimizer`.

    """
    groups = list(trial.param_groups)
    trial.param_groups.clear()
    for group in groups:
        trial.add_param_group(group)
    return trial


def remade(trial: Optimizer) -> Optimizer:
    """Return an optimizer of the class of a trial's, made anew of its groups: one that makes its state in ``__init__``.

    What ``__init__`` takes and the defaults of the groups hold is given to it, too: Adagrad of torch 2.6 takes the
    value that its sums start from as an argument only.

    Args:
        trial: copy of an optimizer, see `trial_optimizer`.

    """
    kind: Callable[..., Optimizer] = type(trial)
    taken = inspect.signature(kind).parameters
    return kind(trial.param_groups, **{name: value for name, value in trial.defaults.items() if name in taken})


def not_tried(optimizer: Optimizer, error: Exception) -> str:
    """Return in words that an optimizer could not be tried, and what it raised."""
    raised = " ".join(str(error).split())[:120]
    return f"{type(optimizer).__name__} {_NOT_TRIED} ({type(error).__name__}: {raised})"


@contextmanager
def apart_from_the_run(device: torch.device) -> Iterator[None]:
    """Take steps of a trial without a trace in the run: in its random numbers, compiled code and warnings.

    Args:
        device: device of the throw-away parameters.

    """
    on_cpu = device.type == "cpu"
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with (
        torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type),
        torch.compiler.set_stance("force_eager"),  # an optimizer that compiles its step would do so for these shapes
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)  # noqa: NPY002 (what optimizers may draw from)
