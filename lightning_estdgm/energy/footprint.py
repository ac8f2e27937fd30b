"""CO2 and cost of joules, from what the user states; kept apart from the joules themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Footprint"]

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Footprint:
    """What a kilowatt-hour means where the machine stands.

    ``grams = joules / 3.6e6 * pue * grams_co2_per_kwh`` and ``cost = joules / 3.6e6 * pue * price_per_kwh``.
    Nothing is looked up or assumed: a figure whose factor is not given is None.

    Args:
        grams_co2_per_kwh: carbon intensity of the electricity.
        price_per_kwh: in any currency.
        pue: energy of the building over energy of its computers; 1 leaves the building out.
        currency: for display.

    Raises:
        TypeError: a factor is no number.
        ValueError: a factor is negative or not finite, `pue` is below 1, or neither factor is given.

    Example:
        >>> footprint = Footprint(grams_co2_per_kwh=380, pue=1.2)
        >>> round(footprint.grams_co2(3.6e6)), footprint.cost(3.6e6)
        (456, None)
    """

    grams_co2_per_kwh: float | None = None
    price_per_kwh: float | None = None
    pue: float = 1.0
    currency: str = ""

    def __post_init__(self) -> None:
        if self.grams_co2_per_kwh is None and self.price_per_kwh is None:
            raise ValueError("expected grams_co2_per_kwh or price_per_kwh, got neither")
        for name, least in (("grams_co2_per_kwh", 0.0), ("price_per_kwh", 0.0), ("pue", 1.0)):
            value = getattr(self, name)
            if value is None and name != "pue":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")

    def grams_co2(self, joules: float | None) -> float | None:
        """Grams of CO2 (or of what the intensity counts); None where the joules or the intensity are unknown."""
        return self._times(joules, self.grams_co2_per_kwh)

    def cost(self, joules: float | None) -> float | None:
        """Money, in the currency of the price; None where the joules or the price are unknown."""
        return self._times(joules, self.price_per_kwh)

    def _times(self, joules: float | None, per_kwh: float | None) -> float | None:
        return None if joules is None or per_kwh is None else joules / _JOULES_PER_KWH * self.pue * per_kwh
