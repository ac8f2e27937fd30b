"""Checks of settings: what they accept, and the words in which they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lightning_estdgm._checks import (
    check_fraction,
    check_int,
    check_number,
    check_share,
    expect_fraction,
    expect_int,
    expect_positive,
)


@pytest.mark.parametrize("value", [1, 2, 10**12])
def test_an_int_of_the_least_and_above_passes(value: int) -> None:
    check_int("steps", value, at_least=1)
    expect_int("steps", value, at_least=1)


@pytest.mark.parametrize("value", [1, 1.0, 7.5, 10**12])
def test_a_number_of_the_least_and_above_passes(value: float) -> None:
    check_number("pue", value, at_least=1.0)
    expect_positive("pue", value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_a_fraction_passes(value: float) -> None:
    expect_fraction("warmup", value)
    check_fraction("warmup", value)


@pytest.mark.parametrize("value", [math.nextafter(0.0, 1.0), 0.5, 1, 1.0])
def test_a_share_passes(value: float) -> None:
    check_share("density", value)
    check_share("density", value, zero=True)
    check_share("density", 0.0, zero=True)


@pytest.mark.parametrize(
    ("check", "value", "error", "message"),
    [
        (check_int, True, TypeError, "x must be an int, got True"),
        (check_int, 1.0, TypeError, "x must be an int, got 1.0"),
        (check_int, "1", TypeError, "x must be an int, got '1'"),
        (check_int, None, TypeError, "x must be an int, got None"),
        (check_int, 0, ValueError, "x must be at least 1, got 0"),
        (check_number, True, TypeError, "x must be a number, got True"),
        (check_number, "1", TypeError, "x must be a number, got '1'"),
        (check_number, 0.5, ValueError, "x must be a finite number of at least 1, got 0.5"),
        (check_number, math.inf, ValueError, "x must be a finite number of at least 1, got inf"),
        (check_number, math.nan, ValueError, "x must be a finite number of at least 1, got nan"),
        (expect_int, True, TypeError, "x: got True, expected an int"),
        (expect_int, 1.0, TypeError, "x: got 1.0, expected an int"),
        (expect_int, 0, ValueError, "x: got 0, expected at least 1"),
    ],
)
def test_refusals_with_a_least_value(
    check: Callable[..., None], value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        check("x", value, at_least=1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_share, 0.0, "x must lie in (0, 1], got 0.0"),
        (check_share, 1.5, "x must lie in (0, 1], got 1.5"),
        (check_share, math.nan, "x must lie in (0, 1], got nan"),
        (partial(check_share, zero=True), -0.5, "x must lie in [0, 1], got -0.5"),
        (check_fraction, 1.0, "x must lie in [0, 1), got 1.0"),
        (check_fraction, -0.5, "x must lie in [0, 1), got -0.5"),
        (check_fraction, math.nan, "x must lie in [0, 1), got nan"),
        (expect_fraction, 1, "x: got 1, expected a fraction in [0, 1)"),
        (expect_fraction, -0.1, "x: got -0.1, expected a fraction in [0, 1)"),
        (expect_fraction, math.nan, "x: got nan, expected a fraction in [0, 1)"),
        (expect_positive, 0, "x: got 0, expected a positive number"),
        (expect_positive, math.inf, "x: got inf, expected a positive number"),
        (expect_positive, math.nan, "x: got nan, expected a positive number"),
    ],
)
def test_refusals_of_an_interval(check: Callable[..., None], value: float, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check("x", value)
    assert str(caught.value) == message


def test_what_else_would_be_accepted_is_said() -> None:
    with pytest.raises(TypeError, match=r"^x must be an int or None, got 'many'$"):
        check_int("x", "many", at_least=1, expected="an int or None")
