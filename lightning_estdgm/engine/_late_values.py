"""`LateValues`: first values of a model that was built without storage, given module by module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.engine._own_values import OwnValues, has_reset


class LateValues:
    """First values of what lies on the meta device in a model, in the order of its modules.

    Each module's `reset_parameters` draws them, then the model's ``_init_weights(module)`` if it has one, as where a
    model is built on a device: after one seed they are the same values, if modules draw where they are made and in the
    order in which the model lists them. A constructor calls its hook after all modules have drawn values of their own.
    So where there is one, the random numbers before each draw are found first: all are made once, one after the other.

    Args:
        model: model, built on the meta device or not.
        device: device that the values are drawn on.

    Raises:
        ValueError: if a module with parameters or buffers on the meta device has no `reset_parameters`, and no
            ``_init_weights`` gives them all; or if the latter cannot be tried there.

    Warns:
        RuntimeWarning: if the constructor has given values by code of its own, which are lost on the meta device.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> late = LateValues(model)
        >>> late.reach(model[0]), model[0].weight.is_meta, model[1].weight.is_meta
        (True, False, True)

    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._waiting = [m for m in model.modules() if any(tensor.is_meta for tensor in _tensors(m))]
        self._own = own = OwnValues(model, self._waiting)
        for name, module in model.named_modules():
            if module not in self._waiting or has_reset(module):
                continue
            if any(tensor.is_meta and id(tensor) not in own.covered for tensor in _tensors(module)):
                raise ValueError(
                    f"{name or 'the model'!r} ({type(module).__name__}) lies on the meta device and has no "
                    "reset_parameters() to draw its first values, and no _init_weights(module) of the model gives "
                    "them: give it one, or build the model on a device"
                )
        if why := own.why_lost():
            warnings.warn(why, RuntimeWarning, stacklevel=3)
        self._before = self._rehearsed() if own.has_hooks else []  # random numbers, by the place of what draws

    def reach(self, module: nn.Module) -> bool:
        """Give values to a module and to all before it; return whether it had none yet."""
        if module not in self._waiting:
            return False
        while self._give(self._waiting.pop(0)) is not module:
            pass
        return True

    def finish(self) -> None:
        """Give values to all that have none yet."""
        while self._waiting:
            self._give(self._waiting.pop(0))
        if self._before:
            torch.set_rng_state(self._before[-1])

    @torch.no_grad()
    def _give(self, module: nn.Module) -> nn.Module:
        shared = [p for p in module._parameters.values() if p is not None and not p.is_meta]  # have another's values
        values = [parameter.clone() for parameter in shared]
        self._store(module)
        places = [self._own.events.index((module, None)), *self._own.calls[module]] if self._before else []
        if not places:
            _draw(module, None)
        for place in places:
            torch.set_rng_state(self._before[place])
            _draw(*self._own.events[place])
            if self._own.events[place][1] is None:
                _copy_(shared, values)
        for parameter, value in zip(shared, values, strict=True):
            if id(parameter) not in self._own.redrawn:
                parameter.copy_(value)
        return module

    @torch.no_grad()
    def _rehearsed(self) -> list[Tensor]:
        """Draw all values, a module at a time, and let go of them; return the random numbers before each, and after."""
        states, stored = [], list[tuple[Any, str, Tensor]]()
        for module, hook in self._own.events:
            states.append(torch.get_rng_state())
            if module in self._waiting:
                _take_back(stored)  # until now, as a call for what holds it may write to it
                stored = self._store(module)
            if hook is not None or module in self._waiting:
                _draw(module, hook)
        _take_back(stored)
        return [*states, torch.get_rng_state()]

    def _store(self, module: nn.Module) -> list[tuple[Any, str, Tensor]]:
        """Have a module store what lies on the meta device; return where that was, and what."""
        there: list[tuple[Any, str, Tensor]] = []
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = nn.Parameter(torch.empty_like(parameter, device=self._device), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, values)  # the parameter stays the same object
                there.append((module._parameters, name, values))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=self._device)
                there.append((module._buffers, name, buffer))
        return there


def _take_back(stored: list[tuple[Any, str, Tensor]]) -> None:
    for place, name, before in stored:
        if isinstance(before, nn.Parameter):
            torch.utils.swap_tensors(place[name], before)
        else:
            place[name] = before


def _copy_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _draw(module: Any, hook: Callable[[nn.Module], Any] | None) -> None:
    if hook is not None:
        hook(module)
    elif has_reset(module):
        module.reset_parameters()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
