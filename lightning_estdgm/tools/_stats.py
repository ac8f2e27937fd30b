"""Means, spreads and ratios over repeated runs, and their text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import TypedDict

DASH = "–"
"""Text of a value that is not known."""


class Spread(TypedDict):
    """Mean and sample standard deviation of values.

    Attributes:
        mean: Mean of the values; None if any is missing.
        std: Sample standard deviation; None for one value, or if any is missing.
        values: The values themselves.
    """

    mean: float | None
    std: float | None
    values: list[float | None]


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation (None for one value), None if any value is missing.

    >>> spread([1.0, 3.0])["mean"], round(spread([1.0, 3.0])["std"], 4), spread([2.0])["std"]
    (2.0, 1.4142, None)
    >>> spread([1.0, None])["mean"] is None
    True
    """
    found = list(values)
    known = [v for v in found if v is not None]
    if not known or len(known) < len(found):
        return {"mean": None, "std": None, "values": found}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None, "values": found}


def ratio(over: float | None, under: float | None) -> float | None:
    """Quotient of two values; None if one is missing or the divisor is 0.

    >>> ratio(3.0, 2.0), ratio(None, 2.0), ratio(3.0, 0.0)
    (1.5, None, None)
    """
    return over / under if over is not None and under else None


def ratios(over: Sequence[float | None], under: Sequence[float | None], paired: bool) -> list[float | None]:
    """Quotient of each pair of values, for `spread`; one quotient of the means where the values are not ``paired``.

    >>> ratios([2.0, 6.0], [1.0, 2.0], paired=True), ratios([2.0, 6.0], [1.0, 3.0], paired=False)
    ([2.0, 3.0], [2.0])
    """
    if paired:
        return [ratio(o, u) for o, u in zip(over, under, strict=True)]
    return [ratio(spread(over)["mean"], spread(under)["mean"])]


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


def spread_text(
    values: Spread, places: int | None = None, *, scale: float = 1.0, unit: str = "", sign: bool = False
) -> str:
    """Mean ± standard deviation, without the deviation of a single value; a dash for a mean that is not known.

    >>> spread_text(spread([1.0, 3.0])), spread_text(spread([2.0])), spread_text(spread([None]))
    ('2.0 ± 1.4', '2.000', '–')
    >>> spread_text(spread([0.25, 0.5]), 1, scale=100, unit="%"), spread_text(spread([0.5]), 2, sign=True)
    ('37.5 ± 17.7 %', '+0.50')

    Args:
        values: Mean and deviation.
        places: Decimals of both; None for four significant digits of the mean, but no more decimals than two digits
            of the deviation have.
        scale: Factor of both.
        unit: What follows a known value after a blank.
        sign: Write the plus of a positive mean.
    """
    mean, std = values["mean"], values["std"]
    if mean is None:
        return DASH
    if places is None:
        places = len(number(mean * scale).partition(".")[2])
        if std:
            places = max(0, min(places, 1 - math.floor(math.log10(std * scale))))
    text = f"{mean * scale:{'+' if sign else ''}.{places}f}"
    if std is not None:
        text += f" ± {std * scale:.{places}f}"
    return f"{text} {unit}" if unit else text
