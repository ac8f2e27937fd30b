"""`LaterWhole`: a whole tensor of a state dict, made at each use: so a file is written a layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_MADE_LATER: ContextVar[bool] = ContextVar("made_later", default=False)


@contextlib.contextmanager
def made_later() -> Iterator[None]:
    """Inside, state dicts of packed layers and of their optimizers hold `LaterWhole` for whole tensors."""
    token = _MADE_LATER.set(True)
    try:
        yield
    finally:
        _MADE_LATER.reset(token)


def is_made_later() -> bool:
    """Whether this is inside `made_later`."""
    return _MADE_LATER.get()


class LaterWhole(Tensor):
    """A tensor without memory of its own: each function takes what `make` returns, in its place.

    What a function writes to stays: then the tensor is kept from there on. It has no address, so what reads memory past
    torch's functions cannot take it.

    Args:
        like: tensor of its dtype and device.
        shape: its shape.
        make: function that returns the tensor.

    """

    _make: Callable[[], Tensor]
    _kept: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], make: Callable[[], Tensor]) -> LaterWhole:
        """Make one of a shape, dtype and device."""
        new: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        new._make, new._kept = make, None
        return new

    def __init__(self, like: Tensor, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        super().__init__()

    def whole(self, *, keep: bool = False) -> Tensor:
        """Return the plain tensor, which is made anew unless it is kept."""
        made = self._make() if self._kept is None else self._kept
        if keep:
            self._kept = made
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function on the plain tensors."""
        keep = func._schema.is_mutable
        args, kwargs = tree_map_only(LaterWhole, lambda one: one.whole(keep=keep), (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return torch.clone(self.whole())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.whole())
