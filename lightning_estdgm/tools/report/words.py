"""Values as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Unit", "Units", "number", "percent", "text"]


@dataclass(frozen=True)
class Unit:
    """A unit with its size in J or s."""

    name: str
    size: float


_JOULES = (Unit("J", 1.0), Unit("kJ", 1e3), Unit("MJ", 1e6), Unit("GJ", 1e9))
_SECONDS = (Unit("s", 1.0), Unit("h", 3600.0))


@dataclass(frozen=True)
class Units:
    """What energy and time are shown in, throughout a report."""

    energy: Unit
    time: Unit

    @classmethod
    def of(cls, joules: float, seconds: float) -> Units:
        """Those in which the largest values have at most four digits before the point, as far as there are such.

        >>> units = Units.of(joules=12_000.0, seconds=900.0)
        >>> units.energy.name, units.time.name
        ('kJ', 's')
        """

        def fitting(units: Sequence[Unit], largest: float) -> Unit:
            return next((unit for unit in units if largest < 1e4 * unit.size), units[-1])

        return cls(fitting(_JOULES, joules), fitting(_SECONDS, seconds))


def number(value: float, digits: int = 4) -> str:
    """Plain decimals, at least ``digits`` significant ones.

    >>> number(0.01234), number(1234.56), number(0.0)
    ('0.01234', '1235', '0')
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 12)}f}"


def percent(share: float, places: int = 1) -> str:
    """A share in percent.

    >>> percent(0.9991)
    '99.9 %'
    """
    return f"{100 * share:.{places}f} %"


def text(value: Any) -> str:
    """A value of a summary in words; equal entries of a list are counted.

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
