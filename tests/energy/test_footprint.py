"""CO2 and cost."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_estdgm import Footprint


def test_a_footprint_multiplies_energy_by_what_was_stated() -> None:
    footprint = Footprint(grams_co2_per_kwh=500.0, price_per_kwh=0.2, pue=1.5, currency="EUR")
    assert footprint.grams_co2(7.2e6) == 2 * 1.5 * 500.0
    assert footprint.cost(7.2e6) == pytest.approx(2 * 1.5 * 0.2)
    assert footprint.grams_co2(None) is None
    assert Footprint(price_per_kwh=0).cost(7.2e6) == 0.0
    assert Footprint(price_per_kwh=0).grams_co2(7.2e6) is None


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "expected grams_co2_per_kwh or price_per_kwh, got neither"),
        ({"pue": 1.2}, ValueError, "got neither"),
        ({"grams_co2_per_kwh": -1}, ValueError, "grams_co2_per_kwh must be a finite number of at least 0, got -1"),
        ({"price_per_kwh": float("nan")}, ValueError, "price_per_kwh must be a finite number of at least 0, got nan"),
        ({"price_per_kwh": 1, "pue": 0.9}, ValueError, "pue must be a finite number of at least 1, got 0.9"),
        ({"price_per_kwh": 1, "pue": None}, TypeError, "pue must be a number, got None"),
        ({"grams_co2_per_kwh": "380"}, TypeError, "grams_co2_per_kwh must be a number, got '380'"),
        ({"price_per_kwh": True}, TypeError, "price_per_kwh must be a number, got True"),
    ],
)
def test_bad_factors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Footprint(**kwargs)
