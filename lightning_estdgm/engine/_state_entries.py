"""`state_entries`: the tensors that an optimizer keeps for a parameter, wherever it keeps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.engine._hooked_optimizers import parameters_of

Path = tuple[str, ...]
"""Place of a state entry in an optimizer: attribute, keys, and the name of an inner tensor of a tensor subclass."""

_DEPTH = 6  # of nested containers that are searched


def state_entries(optimizer: Optimizer, parameter: Tensor, *, shorter: bool = False) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors with one element for each element of a parameter that one optimizer keeps for it.

    They are looked for in all attributes of the optimizer: in containers keyed by the parameter or its id, and in lists
    with one item for each parameter. Optimizers that it wraps are not searched. Of a tensor subclass, such as a
    quantised one, the inner tensors are yielded if they have as many elements, else the tensor itself; of a stack of
    tensors of the parameter's shape, each. Step counts and factored moments have fewer elements, and are left out.

    Args:
        optimizer: optimizer, or a wrapper of one.
        parameter: parameter that it holds.
        shorter: whether the vectors of fewer elements, but more than one, are yielded instead.

    """
    every = parameters_of(optimizer)
    index = next((i for i, known in enumerate(every) if known is parameter), None)
    search = _Search(parameter, index, len(every), shorter=shorter)
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if not isinstance(value, Optimizer | nn.Module):
            yield from search.visit(value, (name,), belongs=False)


def entry_name(optimizer: Optimizer, path: Path) -> str:
    """Return what an entry is called in messages."""
    return f"{type(optimizer).__name__}.{'.'.join(path)}"


class _Search:
    """Search of nested containers for what belongs to one parameter, the `index`-th of `count`; see `state_entries`."""

    def __init__(self, parameter: Tensor, index: int | None, count: int, *, shorter: bool) -> None:
        self._parameter, self._index, self._count, self._shorter = parameter, index, count, shorter

    def visit(self, value: Any, path: Path, *, belongs: bool) -> Iterator[tuple[Path, Tensor]]:
        """Yield the entries in a value; `belongs` says whether it is the parameter's own."""
        if isinstance(value, Tensor):
            if belongs and value is not self._parameter and not isinstance(value, nn.Parameter):
                yield from self._tensors(value, path)
        elif len(path) > _DEPTH:
            return
        elif isinstance(value, Mapping):
            yield from self._items(value, path, belongs)
        elif isinstance(value, list | tuple | deque):
            if belongs:
                for position, item in enumerate(value):
                    yield from self.visit(item, (*path, str(position)), belongs=True)
            elif self._index is not None and len(value) == self._count and path != ("param_groups",):
                yield from self.visit(value[self._index], (*path, "[i]"), belongs=True)
            elif path == ("param_groups",):
                for group in value:
                    yield from self.visit(group, path, belongs=False)

    def _items(self, value: Mapping[Any, Any], path: Path, belongs: bool) -> Iterator[tuple[Path, Tensor]]:
        for key, item in value.items():
            if belongs:
                yield from self.visit(item, (*path, str(key)), belongs=True)
            elif key is self._parameter or (type(key) is int and key == id(self._parameter)):
                yield from self.visit(item, path, belongs=True)
            elif isinstance(key, str):
                yield from self.visit(item, (*path, key), belongs=False)

    def _tensors(self, value: Tensor, path: Path) -> Iterator[tuple[Path, Tensor]]:
        local, expected = local_tensor(value), local_tensor(self._parameter)
        if self._shorter:
            if type(local) is Tensor and local.dim() == 1 and 1 < local.numel() < expected.numel():
                yield path, value
            return
        if not hasattr(local, "__tensor_flatten__"):
            if _has_an_element_for_each(local, expected):
                yield path, value
            elif local.dim() > 1 and local.shape[1:] == expected.shape and local.layout is torch.strided:
                yield from (((*path, str(i)), part) for i, part in enumerate(local.unbind()))
            return
        names = local.__tensor_flatten__()[0]
        inner = [(name, getattr(local, name)) for name in names]
        same = [(name, tensor) for name, tensor in inner if _has_an_element_for_each(tensor, expected)]
        if same:
            yield from (((*path, name), tensor) for name, tensor in same)
        elif local.shape == expected.shape:
            yield path, local


def _has_an_element_for_each(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has the parameter's shape, or its elements in one row or in another shape."""
    if tensor.layout is not torch.strided or tensor.dim() == 0 or tensor.numel() != parameter.numel():
        return False
    return tensor.shape == parameter.shape or tensor.is_contiguous()
