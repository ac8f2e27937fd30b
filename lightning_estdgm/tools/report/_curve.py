"""Values logged at steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Curve:
    """Values logged at steps; steps rise strictly.

    >>> curve = Curve.of([(0, 1.0), (10, 3.0)])
    >>> curve.at(5), curve.at(10), curve.at(11)
    (2.0, 3.0, None)

    Attributes:
        steps: Steps, ``[n]``.
        values: Value at each step, ``[n]``.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[int, float]]) -> Curve:
        """From (step, value) in the order they were written; of two at one step the later stands (a resumed run)."""
        last = dict(points)
        steps = sorted(last)
        return cls(np.array(steps, dtype=np.int64), np.array([last[step] for step in steps], dtype=np.float64))

    def at(self, step: float) -> float | None:
        """The value at a step, linear between two points; None outside them."""
        value = float(self.along(np.array([step], dtype=np.float64))[0])
        return None if math.isnan(value) else value

    def along(self, steps: NDArray[Any]) -> NDArray[np.float64]:
        """The values at many steps; nan outside the points."""
        if not len(self.steps):
            return np.full(len(steps), np.nan)
        return np.interp(steps, self.steps, self.values, left=np.nan, right=np.nan)

    def finite(self) -> Curve:
        """The curve without points that are infinite or not a number."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])
