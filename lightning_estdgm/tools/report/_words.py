"""Units and settings as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A unit of energy or time.

    Attributes:
        name: Symbol.
        size: Size in J or s.
    """

    name: str
    size: float


_JOULES = (Unit("J", 1.0), Unit("kJ", 1e3), Unit("MJ", 1e6), Unit("GJ", 1e9))
_SECONDS = (Unit("s", 1.0), Unit("h", 3600.0))


@dataclass(frozen=True)
class Units:
    """Units in which a report shows energy and time."""

    energy: Unit
    time: Unit

    @classmethod
    def of(cls, joules: float, seconds: float) -> Units:
        """Units in which the largest values have at most four digits before the point, or else the largest units.

        >>> units = Units.of(joules=12_000.0, seconds=900.0)
        >>> units.energy.name, units.time.name
        ('kJ', 's')
        """

        def fitting(units: Sequence[Unit], largest: float) -> Unit:
            return next((unit for unit in units if largest < 1e4 * unit.size), units[-1])

        return cls(fitting(_JOULES, joules), fitting(_SECONDS, seconds))


def text(value: Any) -> str:
    """Text of a value of a summary; equal entries of a list are counted.

    >>> text(["H100", "H100"]), text(True), text(None), text({"16": 4})
    ('2 × H100', 'yes', 'not stated', '16: 4')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        counts = Counter(map(text, value))
        return ", ".join(f"{n} × {item}" if n > 1 else item for item, n in counts.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not stated" if value is None else str(value)


def made_by() -> str:
    """Name and version of this package in a sentence."""
    try:
        return f"Made by lightning_estdgm {version('lightning-estdgm')}."
    except PackageNotFoundError:  # a source tree that was never installed
        return "Made by lightning_estdgm."
