"""`watch_forward`: a watch on a module's forward that also sees ``module.forward(x)``, which passes hooks by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode

Watch = Callable[..., Any]
"""Called with a module's forward and the arguments of a call; calls it and returns its output."""


def watch_forward(module: nn.Module, watch: Watch) -> WatchHandle:
    """Have a module's forward be called by a watch, within all hooks, until the handle is removed.

    It is silent while torch.compile traces. The module's class may be swapped meanwhile, and the module copied and
    pickled: a copy is not watched.
    """
    watched = vars(module).get("forward")
    if not isinstance(watched, _WatchedForward):
        watched = vars(module)["forward"] = _WatchedForward(module, watched)
    watched.watches.append(watch)
    return WatchHandle(watched, watch)


def probe_forward(module: nn.Module, hook: Callable[..., None]) -> WatchHandle:
    """Have a function with the arguments of a forward hook with kwargs be called after each forward.

    See `watch_forward`.
    """

    def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hook(module, args, kwargs, output)
        return output

    return watch_forward(module, watch)


def is_traced() -> bool:
    """Whether torch traces what runs now, or computes with fake tensors: there are no numbers to look at."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or detect_fake_mode() is not None


def replaced_forward(module: nn.Module) -> Any:
    """Return the forward that was set on the module itself in the place of its class's, or None."""
    own = vars(module).get("forward")
    return own.replaced if isinstance(own, _WatchedForward) else own


@dataclass(eq=False)
class WatchHandle:
    """A watch, to be removed."""

    _watched: _WatchedForward
    _watch: Watch

    def remove(self) -> None:
        """Remove the watch; the last one leaves the module as it was."""
        self._watched.watches.remove(self._watch)
        if not self._watched.watches:
            self._watched.leave()


class _WatchedForward:
    """What stands for a module's forward, on the module itself, as long as it is watched."""

    def __init__(self, module: nn.Module, replaced: Any) -> None:
        self.replaced = replaced
        self.watches: list[Watch] = []
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward
        if not torch.compiler.is_compiling():
            if not self.watches:
                self.leave()
            for watch in self.watches:
                forward = partial(watch, forward)
        return forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)  # that of the class which it has now

    def leave(self) -> None:
        """Leave the module; a copy's does when it is called."""
        own = vars(self._module)
        if own.get("forward") is self:
            del own["forward"]
            if self.replaced is not None:
                own["forward"] = self.replaced

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "watches": []}
