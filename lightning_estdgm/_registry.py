"""Discovery of backends, sources and adapters in a folder of this package and in entry points of other packages.

A discovery folder holds ``_protocol.py`` and, beside it, only modules (or packages) that offer one thing each under an
agreed name, such as ``BACKEND``. Another distribution offers one by an entry point that loads to it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType


@dataclass(frozen=True)
class Offer:
    """One object that was found, not loaded yet.

    Attributes:
        name: name of the module or entry point.
        origin: module or entry point it comes from, in words for error messages.
        is_own: whether this package offers it.
        load: function that imports and returns it. It raises any error of the import, and TypeError if a module of the
            folder lacks the agreed name.

    """

    name: str
    origin: str
    is_own: bool
    load: Callable[[], object]


def offers(package: ModuleType, attribute: str, group: str) -> list[Offer]:
    """Return all offers: the modules of a folder by name, then the entry points of a group by name.

    Args:
        package: package of the folder.
        attribute: agreed name of the object in each of its modules.
        group: group of the entry points.

    """
    modules = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    points = sorted(entry_points(group=group), key=lambda point: point.name)
    return [_of_module(f"{package.__name__}.{name}", attribute) for name in modules] + [_of_point(x) for x in points]


def _of_module(name: str, attribute: str) -> Offer:
    def load() -> object:
        module = importlib.import_module(name)
        if not hasattr(module, attribute):
            raise TypeError(f"{name} must offer {attribute}: its folder holds nothing else")
        return getattr(module, attribute)

    return Offer(name.rpartition(".")[2], f"{name}.{attribute}", True, load)


def _of_point(point: EntryPoint) -> Offer:
    return Offer(point.name, f"entry point {point.name!r} ({point.value})", False, point.load)
