"""Comparison to the bit, for tests of what must come back as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ: types, orders of keys, attributes, and tensors' bits, dtypes and strides."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} became {type(b).__name__}"]
    if isinstance(a, Tensor):
        meta = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
        if meta[0] != meta[1]:
            return [f"{path}: {meta[0]} became {meta[1]}"]
        return [] if _bytes(a) == _bytes(b) else [f"{path}: values"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{path}: keys {list(a)} became {list(b)}"]
        attributes = differences(vars(a), vars(b), f"{path}.__dict__") if hasattr(a, "__dict__") else []
        return attributes + [d for k in a for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: length"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} became {b!r}"]
