"""`OwnValues`: the first values that a model gives its modules by ``_init_weights(module)``, beside theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_estdgm._words import first_names

_HOOK = "_init_weights"  # of nanoGPT and of Hugging Face's models, called by ``self.apply`` at the constructor's end


Event = tuple[nn.Module, Callable[[nn.Module], Any] | None]
"""A module that draws its own values (None), or the hook that is called for it."""


class OwnValues:
    """What gives a model its first values, in order: each module itself, and the calls of ``_init_weights(module)``.

    A module that has such a hook calls it at the end of its constructor for all modules within that no other has been
    called for, children first, as ``apply`` does. All is tried on the meta device, where nothing is drawn: so it is
    known what each writes, and what else the constructors have written, as each parameter counts its writes.

    Args:
        model: model, built on the meta device.
        waiting: modules with parameters or buffers there.

    Attributes:
        events: what gives values, in the order of the constructors.
        calls: places in `events` of the calls that are to be made once a module has values, by module.
        covered: ids of the tensors that a hook writes.
        redrawn: ids of the parameters that are tied, and that hooks have written to since.
        lost: names of parameters that the constructor has written to beside all this, or that a call for another
            module writes to: what they would have been is not known.

    Raises:
        ValueError: if a hook cannot be called on the meta device.

    """

    def __init__(self, model: nn.Module, waiting: Sequence[nn.Module]) -> None:
        tensors = {id(tensor): tensor for tensor in model.parameters() if tensor.is_meta}
        owners = {id(tensor): module for module in reversed(waiting) for tensor in module.parameters(recurse=False)}
        built = {key: tensor._version for key, tensor in tensors.items()}
        by_reset: dict[int, int] = {}
        for module in waiting:
            before = {key: tensor._version for key, tensor in tensors.items()}
            if has_reset(module):
                _tried(module, module.reset_parameters)  # type: ignore[arg-type]
            for key, tensor in tensors.items():
                if tensor._version > before[key]:
                    by_reset.setdefault(key, tensor._version - before[key])  # of a tied one, where it was made
        self.events = list(_events(model, set(), set())) if waiting else []
        self.calls: dict[nn.Module, list[int]] = {module: [] for module in waiting}
        self.covered: set[int] = set()
        before = {key: tensor._version for key, tensor in tensors.items()}
        foreign, last = set[int](), None
        for place, (module, hook) in enumerate(self.events):
            if hook is None:
                continue
            last = module if module in self.calls else last or waiting[0]
            self.calls[last].append(place)
            written = _tried(module, hook, module)
            mine = {id(t) for t in (*model.parameters(), *model.buffers()) if t.untyped_storage()._cdata in written}
            self.covered |= mine
            own = {id(tensor) for tensor in last.parameters(recurse=False)}
            foreign |= {key for key in mine & owners.keys() if key not in own}
        counts = {key: by_reset.get(key, 0) + tensor._version - before[key] for key, tensor in tensors.items()}
        more = {key for key in tensors if built[key] > counts[key]}
        self.redrawn = {key for key in tensors if counts[key] > by_reset.get(key, 0) and built[key] >= counts[key]}
        self.lost = [name for name, tensor in model.named_parameters() if id(tensor) in more | foreign]

    @property
    def has_hooks(self) -> bool:
        """Whether the model has such a hook."""
        return any(hook is not None for _, hook in self.events)

    def why_lost(self) -> str:
        """Return what to know of the values that are lost, in words; empty if there are none."""
        if not self.lost:
            return ""
        return (
            f"{len(self.lost)} parameters on the meta device ({first_names(self.lost)}) were given first values by the "
            f"model's own code, which are lost there: they get those of reset_parameters() and {_HOOK}(module). Have "
            "one of these give them, or build the model on a device"
        )


class _Writes(TorchDispatchMode):
    """Notes the storages that are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.storages.add(value.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _tried(module: nn.Module, function: Callable[..., Any], *args: Any) -> set[int]:
    """Call what gives values on the meta device, and return the storages that it writes to."""
    with _Writes() as writes:
        try:
            function(*args)
        except Exception as error:
            raise ValueError(
                f"first values of {type(module).__name__} cannot be drawn layer by layer: on the meta device its "
                f"{getattr(function, '__name__', 'function')} raises {type(error).__name__}: {error}. Build the model "
                "on a device"
            ) from error
    return writes.storages


def has_reset(module: nn.Module) -> bool:
    """Whether a module draws its values by itself."""
    return callable(getattr(module, "reset_parameters", None))


def _events(module: nn.Module, seen: set[int], called: set[int]) -> Iterator[Event]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield module, None
    for child in module.children():
        yield from _events(child, seen, called)
    hook = getattr(module, _HOOK, None)
    if callable(hook):
        for inner in _children_first(module):
            if id(inner) not in called:
                called.add(id(inner))
                yield inner, hook


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
