"""`LateValues`: first values of a model that was built without storage, given module by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LateValues:
    """First values of what lies on the meta device in a model, in the order of its modules.

    Each module's `reset_parameters` draws them, as where a model is built on a device: after one seed they are the same
    values, if modules draw where they are made and in the order in which the model lists them.

    Args:
        model: model, built on the meta device or not.
        device: device that the values are drawn on.

    Raises:
        ValueError: if a module with parameters or buffers on the meta device has no `reset_parameters`.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> late = LateValues(model)
        >>> late.reach(model[0]), model[0].weight.is_meta, model[1].weight.is_meta
        (True, False, True)

    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._waiting: list[nn.Module] = []
        for name, module in model.named_modules():
            if not any(tensor.is_meta for tensor in _tensors(module)):
                continue
            if not callable(getattr(module, "reset_parameters", None)):
                raise ValueError(
                    f"{name or 'the model'!r} ({type(module).__name__}) lies on the meta device and has no "
                    "reset_parameters() to draw its first values: give it one, or build the model on a device"
                )
            self._waiting.append(module)

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

    @torch.no_grad()
    def _give(self, module: Any) -> nn.Module:
        is_new = False
        for parameter in module._parameters.values():
            if parameter is None or not parameter.is_meta:
                continue  # or another module's as well, and given its values there
            values = nn.Parameter(torch.empty_like(parameter, device=self._device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, values)  # the parameter stays the same object
            is_new = True
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=self._device)
                is_new = True
        if is_new:
            module.reset_parameters()
        found: nn.Module = module
        return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
