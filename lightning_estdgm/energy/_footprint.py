"""CO2 and cost of joules, from factors that the user states; kept apart from the joules themselves."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_estdgm._checks import check_number

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Footprint:
    """Carbon intensity and price of the electricity of the machine.

    ``grams = joules / 3.6e6 * pue * grams_co2_per_kwh`` and ``cost = joules / 3.6e6 * pue * price_per_kwh``.
    Nothing is looked up or assumed: a figure whose factor is not given is None.

    Args:
        grams_co2_per_kwh: Carbon intensity of the electricity.
        price_per_kwh: Price of a kilowatt-hour, in any currency.
        pue: Energy of the building over energy of its computers (power usage effectiveness); 1 leaves the
            building out.
        currency: Name of the currency, for display.

    Raises:
        TypeError: A factor is no number.
        ValueError: A factor is negative or not finite, `pue` is below 1, or neither factor is given.

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
            if value is not None or name == "pue":
                check_number(name, value, at_least=least)

    def grams_co2(self, joules: float | None) -> float | None:
        """Return grams of CO2, or of CO2 equivalent if the intensity is; None where joules or intensity are unknown."""
        return self._times(joules, self.grams_co2_per_kwh)

    def cost(self, joules: float | None) -> float | None:
        """Return the cost in the currency of the price; None where joules or price are unknown."""
        return self._times(joules, self.price_per_kwh)

    def _times(self, joules: float | None, per_kwh: float | None) -> float | None:
        return None if joules is None or per_kwh is None else joules / _JOULES_PER_KWH * self.pue * per_kwh
