"""`ScaledGroups`: parameter groups of one optimizer, split by the factor on their learning rate while it steps.

An optimizer reads ``lr`` from the group of a parameter. So that parameters of one group step by different rates, the
optimizer is shown *parts* of the group, each with a rate of its own; before and after a step it holds the groups that
the user has made, which schedulers and checkpoints know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]

_NAMES = ("params", "param_names")


class ScaledGroups:
    """Parameter groups of one optimizer, which it sees split from `enter` to `leave`.

    A part goes on from step to step as a group would that the user had made: what the optimizer writes into it, such as
    a counter or a sum of rates, stays there, and what the user or a scheduler changes in the group reaches every part.
    If parameters move to other parts, because their factors change, a part goes on with the values of its first
    parameter's part before. Into the user's group goes what the optimizer wrote into one part: the one whose rate is
    unscaled if there is one, else the first.

    Args:
        optimizer: optimizer whose own step reads its groups.
        scales_decay: whether ``weight_decay`` is the user's in each part, so that ``lr * weight_decay`` has the part's
            factor; where not, it is divided by that, and their product is the user's.

    Attributes:
        resumed: values that the parts of the next split begin with, by the id of their first parameter.

    """

    def __init__(self, optimizer: Optimizer, *, scales_decay: bool = True) -> None:
        self.resumed: Mapping[int, Group] = {}
        self._optimizer = optimizer
        self._powers = {"lr": 1} if scales_decay else {"lr": 1, "weight_decay": -1}
        self._splits: dict[int, _Split] = {}  # by the id of the user's group
        self._list: list[Group] | None = None  # the optimizer's list of groups, while it holds parts
        self._groups: list[Group] = []  # the user's groups meanwhile

    @property
    def entered(self) -> bool:
        """Whether the optimizer sees the groups split."""
        return self._list is not None

    def enter(self, scales: Mapping[int, float]) -> None:
        """Show the optimizer its groups split.

        Args:
            scales: factor on the learning rate of a parameter, by its id; 1 for those that are not in it.

        """
        self.leave()
        groups, splits, shown = self._optimizer.param_groups, {}, []
        for group in groups:
            layout = _layout(group, scales)
            if set(layout) <= {1.0}:
                shown.append(group)
                continue
            split = self._splits.get(id(group))
            if split is None or not split.has(layout):
                split = _Split(group, layout, split, self.resumed, self._powers)
            split.begin()
            splits[id(group)] = split
            shown += split.parts
        self._splits = splits
        if splits:
            self._list, self._groups = groups, list(groups)
            groups[:] = shown
            self.resumed = {}

    def leave(self) -> None:
        """Give the user's groups back, in the same list and order, with what the optimizer wrote. May be called twice.

        Groups that were added since `enter` come after them.
        """
        if self._list is None:
            return
        groups, self._list = self._list, None
        known = {id(group) for group in self._groups}
        for split in self._splits.values():
            split.end()
            known |= {id(part) for part in split.parts}
        groups[:] = self._groups + [group for group in groups if id(group) not in known]

    def own_values(self) -> dict[int, Group]:
        """Return what parts hold that differs from the user's group, by the ids of their parameters."""
        found = dict(self.resumed)
        for split in self._splits.values():
            found |= split.own_values()
        return found


class _Split:
    """One group and the parts that it is shown as.

    Args:
        group: the user's group.
        layout: parameters by the factor on their rate.
        before: the group's split with another layout, from which values go on; ``None``: they start as the group's.
        resumed: as `ScaledGroups.resumed`.
        powers: what a part has of its own, scaled, not from its group, with the power of its factor.

    """

    def __init__(
        self,
        group: Group,
        layout: Mapping[float, list[Tensor]],
        before: _Split | None,
        resumed: Mapping[int, Group],
        powers: Mapping[str, int],
    ) -> None:
        self._group = group  # held, so that its id stays its own
        self._powers = powers
        self._own = {*_NAMES, *powers}
        self._scales = list(layout)
        self._known: dict[str, _Seen] = (
            _seen(group) if before is None else before._known
        )  # the group as its parts have it
        self.parts: list[Group] = []
        names = dict(zip(map(id, group["params"]), group.get("param_names") or (), strict=False))
        for parameters in layout.values():
            if before is None:
                source = group | resumed.get(id(parameters[0]), {})
            else:
                source = before._part_of(parameters[0], group)
            part = {key: _copied(value) for key, value in source.items() if key not in self._own}
            part["params"] = parameters
            if names:
                part["param_names"] = [names[id(parameter)] for parameter in parameters]
            self.parts.append(part)
        self._written = self._scales.index(1.0) if 1.0 in self._scales else 0
        self._given: dict[str, _Seen] = {}

    def has(self, layout: Mapping[float, list[Tensor]]) -> bool:
        """Whether the parts are those of a layout."""
        return self._scales == list(layout) and all(
            len(part["params"]) == len(parameters) and all(map(_is, part["params"], parameters))
            for part, parameters in zip(self.parts, layout.values(), strict=True)
        )

    def begin(self) -> None:
        """Bring what was changed in the group since the last step into all parts, and scale its learning rate."""
        for key, value in self._group.items():
            if key not in self._own and not (key in self._known and self._known[key].is_still(value)):
                for part in self.parts:
                    part[key] = _copied(value)
        for key in self._known.keys() - self._group.keys():
            for part in self.parts:
                part.pop(key, None)
        for part, scale in zip(self.parts, self._scales, strict=True):
            for key in self._powers.keys() & self._group.keys():
                value = self._group[key]
                part[key] = value if scale == 1.0 or value is None else value * scale ** self._powers[key]
        self._given = _seen(self.parts[self._written])

    def end(self) -> None:
        """Write into the group what the optimizer has written into one of its parts."""
        for key, value in self.parts[self._written].items():
            if key in _NAMES or (key in self._given and self._given[key].is_still(value)):
                continue
            new = value / self._scales[self._written] ** self._powers[key] if key in self._powers else value
            old = self._group.get(key)
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
                if old is not new:
                    old.copy_(new)
            else:
                self._group[key] = _copied(new)
        self._known = _seen(self._group)

    def own_values(self) -> dict[int, Group]:
        """Return what parts hold that differs from the group, by the ids of their parameters."""
        found: dict[int, Group] = {}
        for part in self.parts:
            own = {key: value for key, value in part.items() if key not in self._own and self._differs(key, value)}
            found |= {id(parameter): own for parameter in part["params"] if own}
        return found

    def _differs(self, key: str, value: Any) -> bool:
        """Whether a part's value is not the group's; what was changed in the group since will be the part's, too."""
        if key not in self._known or key not in self._group:
            return key not in self._known and key not in self._group
        return self._known[key].is_still(self._group[key]) and not _equal(value, self._group[key])

    def _part_of(self, parameter: Tensor, default: Group) -> Group:
        return next((part for part in self.parts if any(_is(parameter, p) for p in part["params"])), default)


class _Seen:
    """A value of a group as it was, to tell whether it was changed since: replaced, or written in place."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._version = value._version if isinstance(value, Tensor) else copy.copy(value)

    def is_still(self, value: Any) -> bool:
        """Whether the value is the same."""
        if isinstance(value, Tensor):
            return value is self._value and value._version == self._version
        return not isinstance(self._value, Tensor) and _equal(value, self._version)


def _seen(group: Group) -> dict[str, _Seen]:
    return {key: _Seen(value) for key, value in group.items() if key not in _NAMES}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    try:
        return type(one) is type(other) and bool(one == other)
    except (RuntimeError, ValueError):  # arrays, or tuples of tensors: no single truth
        return False


def _copied(value: Any) -> Any:
    """Return a copy of what can be written in place."""
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _layout(group: Group, scales: Mapping[int, float]) -> dict[float, list[Tensor]]:
    """Return a group's parameters by the factor on their rate, in their order."""
    layout: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        layout.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
    return layout


def _is(one: object, other: object) -> bool:
    return one is other
