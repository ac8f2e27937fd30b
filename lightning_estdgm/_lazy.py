"""Public names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(
    module_name: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names lie in other modules.

    A name is looked up once: then it is an attribute of the package like any other. Repeat the imports under
    ``if TYPE_CHECKING:`` for type checkers and editors, which see no call.

    Args:
        module_name: the package's ``__name__``.
        where: public name -> module that defines it.

    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        value = getattr(import_module(where[name]), name)
        setattr(sys.modules[module_name], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *where})

    return get, names, sorted(where)
