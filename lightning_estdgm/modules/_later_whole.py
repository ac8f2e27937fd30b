"""`LaterWhole`: a whole tensor of a state dict, made at each use: so a file is written a layer at a time.

``torch.save`` asks for the bytes of a storage as late as when it writes them: then the tensor is made, and let go of.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.storage import TypedStorage
from torch.utils._pytree import tree_map_only

_SHAPES: ContextVar[Container[tuple[int, ...]]] = ContextVar("made_later", default=())
_READ_MEMORY = frozenset(
    {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "tolist"}
    | {"_typed_storage", "storage_type", "share_memory_", "is_shared", "pin_memory", "is_pinned"}
)
_SAVED_LATE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def made_later(shapes: Container[tuple[int, ...]]) -> Iterator[None]:
    """Inside, tensors of these shapes are `LaterWhole`.

    So they are in state dicts of packed layers and of their optimizers, and in sparse files that are loaded.
    """
    token = _SHAPES.set(shapes)
    try:
        yield
    finally:
        _SHAPES.reset(token)


def is_made_later(shape: tuple[int, ...]) -> bool:
    """Whether this is inside `made_later` of this shape."""
    return shape in _SHAPES.get()


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor that is no `LaterWhole`."""
    return tensor.whole() if isinstance(tensor, LaterWhole) else tensor


class LaterWhole(Tensor):
    """A tensor without memory of its own: each function takes what `make` returns, in its place.

    What a function writes to stays, and so does what a program has got an address of: then the tensor is kept from
    there on.

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
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give what asks for the memory that of a tensor which is kept; leave other functions to torch."""
        if func is Tensor.detach:
            return args[0]
        if getattr(func, "__name__", "") in _READ_MEMORY and isinstance(args[0], LaterWhole):
            return func(args[0].whole(keep=True), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function on the plain tensors; one that copies makes the tensor later, too."""
        if func is torch.ops.aten.clone.default and args[0]._kept is None:
            return LaterWhole(args[0], args[0].shape, args[0]._make)
        keep = func._schema.is_mutable
        args, kwargs = tree_map_only(LaterWhole, lambda one: one.whole(keep=keep), (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._kept is not None or self.dtype not in _SAVED_LATE or not hasattr(TypedStorage, "_fake_device"):
            return self.whole().__reduce_ex__(protocol)
        hooks: dict[str, Any] = OrderedDict()
        parts = (_LaterStorage(self), 0, tuple(self.shape), self.stride(), False, hooks)
        return torch._utils._rebuild_tensor_v2, parts  # as plain tensors give

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return torch.clone(self.whole())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.whole())


class _LaterStorage(TypedStorage):
    """The storage of a `LaterWhole` as ``torch.save`` asks for it: a number of bytes first, the bytes in the end."""

    @staticmethod
    def __new__(cls, of: LaterWhole) -> Any:
        """Make one without memory."""
        return object.__new__(cls)

    def __init__(self, of: LaterWhole) -> None:
        super().__init__(wrap_storage=_LaterBytes(of), dtype=of.dtype, _internal=True)
        self._of = of
        self._fake_device = of.device  # the file says where it is loaded to by this, instead of by the storage

    def __reduce__(self) -> Any:  # pickle's own
        return self._of.whole().__reduce_ex__(2)[1][0].__reduce__()


class _LaterBytes(torch.UntypedStorage):
    """Bytes on no device, which are there once they are asked for on the CPU."""

    @staticmethod
    def __new__(cls, of: LaterWhole) -> Any:
        """Make one without memory."""
        make: Any = torch.UntypedStorage.__new__  # which takes more than its stub says
        return make(cls, of.numel() * of.itemsize, device="meta")

    def __init__(self, of: LaterWhole) -> None:
        super().__init__()
        self._of = of

    def cpu(self) -> Any:
        """Return the plain storage."""
        return self._of.whole().cpu().untyped_storage()
