"""Checks of numbers that a user sets.

`check_*` name the condition first ("steps must be at least 1, got 0"), `expect_*` the value, as command lines do
("steps: got 0, expected at least 1").
"""

from __future__ import annotations

import math
from typing import TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int and no bool.

    >>> is_int(3), is_int(True), is_int(3.0)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float and no bool; it may be infinite or NaN.

    >>> is_number(3), is_number(0.5), is_number(True), is_number("3")
    (True, True, False, False)
    """
    return is_int(value) or isinstance(value, float)


def check_int(name: str, value: object, *, at_least: int, expected: str = "an int") -> None:
    """Raise unless a setting is an int of at least `at_least`.

    Args:
        name: name of the setting, for messages.
        value: its value.
        at_least: the smallest int that is accepted.
        expected: all accepted types, in words for the message on types, such as "an int or None".

    Raises:
        TypeError: if it is no int.
        ValueError: if it is too small.

    """
    if not is_int(value):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_number(name: str, value: object, *, at_least: float) -> None:
    """Raise unless a setting is a finite number of at least `at_least`.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is too small, infinite or NaN.

    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= at_least):
        raise ValueError(f"{name} must be a finite number of at least {at_least:g}, got {value!r}")


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ValueError unless a setting lies in (0, 1], or with `zero` in [0, 1]."""
    if not (value <= 1.0 and (value >= 0.0 if zero else value > 0.0)):
        raise ValueError(f"{name} must lie in {'[0' if zero else '(0'}, 1], got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless a setting lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def expect_int(name: str, value: object, *, at_least: int) -> None:
    """Raise unless a setting is an int of at least `at_least`.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is too small.

    """
    if not is_int(value):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < at_least:
        raise ValueError(f"{name}: got {value}, expected at least {at_least}")


def expect_fraction(name: str, value: float) -> None:
    """Raise ValueError unless a setting is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a fraction in [0, 1)")


def expect_positive(name: str, value: float) -> None:
    """Raise ValueError unless a setting is a positive number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a positive number")
