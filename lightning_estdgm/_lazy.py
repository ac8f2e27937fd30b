"""Packages whose public names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["attach"]


def attach(
    module_name: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names live in other modules.

    Args:
        module_name: Name of the package, its `__name__`.
        where: By public name, the module that defines it.

    Example:
        >>> getattr_, dir_, all_ = attach("lightning_estdgm", {"Footprint": "lightning_estdgm.energy.footprint"})
        >>> getattr_("Footprint")(price_per_kwh=0.3).cost(3.6e6)
        0.3
    """

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[module_name], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *where})

    return __getattr__, __dir__, sorted(where)
