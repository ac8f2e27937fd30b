"""Another default device of torch, as scripts set it."""

from __future__ import annotations

import torch


def set_default_device(device: str | None) -> None:
    """Set torch's default device; ``None`` takes it back, also where torch 2.6 then fails to say which one it is."""
    torch.set_default_device(device)
    if device is None:
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)
