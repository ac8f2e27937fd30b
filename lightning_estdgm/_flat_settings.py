"""Settings by flat names, which `config.DGMConfig` had before its parts: refused with the place that each has now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any

PLACES = {
    "block_size": "units.size",
    "distribution": "units.distribution",
    **{name: f"update_rule.{name}" for name in ("keep", "grow", "gamma", "drop_fraction", "regrow", "pattern")},
    "redistribute": "update_rule.redistribute",
    "step_exponent": "step_size.exponent",
    "scale_init": "step_size.scale_initial_weights",
    "include": "selection.include",
    "exclude": "selection.exclude",
    "reserve": "inactive",
}
"""Part and field of each setting, by its flat name."""


def new_places(names: Iterable[str]) -> str:
    """Return where settings by flat names are now, in words; empty if none of them is one."""
    told = [_place(name) for name in sorted(set(names) & PLACES.keys())]
    return "; ".join(told)


def _place(name: str) -> str:
    part, _, field = PLACES[name].partition(".")
    if not field:
        return f"{name} is {part} now: {part}=BackwardSet(...)"
    given = f"{part}={part.title().replace('_', '')}({field}=...)"
    return f"{name} is {part}.{field} now: {given}, in YAML {part}: {{{field}: ...}}"


def refuses_flat_names(kind: type) -> type:
    """Have a dataclass say where a setting is that is given by its flat name, rather than that it is unexpected."""
    init: Callable[..., None] = kind.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        if told := new_places(settings):
            flat = sorted(settings.keys() & PLACES.keys())
            raise TypeError(f"{kind.__name__} takes {[f.name for f in fields(kind)]}, got {flat}: {told}")
        init(self, *args, **settings)

    kind.__init__ = checked  # type: ignore[misc]
    return kind


class FlatSettings:
    """Settings by flat names: a type that no value has, so that jsonargparse says of a wrong one where settings are."""

    def __init__(self, value: Any = None) -> None:
        names = value if isinstance(value, Mapping) else [getattr(value, "key", "")]  # of an argument on its own
        told = new_places(names)
        raise ValueError(told or "settings by flat names are taken no more")


with contextlib.suppress(ImportError):  # LightningCLI needs it, and nothing else
    from jsonargparse.typing import register_type

    register_type(FlatSettings, fail_already_registered=False)
