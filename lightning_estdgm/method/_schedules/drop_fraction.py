"""How large a share of the active units an update gives up: functions of (progress, density).

`UpdateRule.drop_fraction` takes a number (annealed to 0 by a half cosine) or such a function. Progress is
`Schedule.drop_progress`: 0 at the start of the run, 1 where updates end. Density is the one updated to.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class StagedDrop:
    """A constant share, or one after the other.

    Attributes:
        shares: in [0, 1), one more than `borders`.
        borders: progress at which the next share begins, rising, in (0, 1).

    Example:
        >>> StagedDrop((0.3,))(progress=0.9, density=0.1)
        0.3

    """

    shares: tuple[float, ...]
    borders: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.borders) + 1:
            raise ValueError(f"expected one share more than borders, got {self.shares} and {self.borders}")
        if not all(0.0 <= share < 1.0 for share in self.shares):
            raise ValueError(f"shares must lie in [0, 1), got {self.shares}")
        if list(self.borders) != sorted(set(self.borders)) or not all(0.0 < x < 1.0 for x in self.borders):
            raise ValueError(f"borders must rise within (0, 1), got {self.borders}")

    def __call__(self, progress: float, density: float) -> float:
        """Return the share at `progress`."""
        return self.shares[bisect.bisect_right(self.borders, progress)]


@dataclass(frozen=True)
class DropTo:
    """Whatever is above `density`: an update keeps that much, and grows back to the schedule's density.

    Attributes:
        density: that is kept of all weights, in (0, 1].

    """

    density: float

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")

    def __call__(self, progress: float, density: float) -> float:
        """Return the share of `density` that is above what is kept."""
        return max(0.0, 1.0 - self.density / density)
