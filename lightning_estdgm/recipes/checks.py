"""Checks of the recipes' settings."""

from __future__ import annotations


def at_least(name: str, value: int, least: int) -> None:
    """Raise TypeError unless ``value`` is an int, and ValueError where it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a fraction in [0, 1)")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a positive number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, expected a positive number")
