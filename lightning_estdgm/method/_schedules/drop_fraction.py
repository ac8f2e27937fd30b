"""Drop fractions: the share of the active units that an update gives up, as functions of progress and density.

`UpdateRule.drop_fraction` takes a number (annealed to 0 by a half cosine) or such a function. Progress is
`Schedule.drop_progress`: 0 at the start of the run, 1 where updates end. Density is that after the update.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from lightning_estdgm._checks import check_share


@dataclass(frozen=True)
class StagedDrop:
    """Drop fraction that is constant in each of several stages.

    Attributes:
        shares: drop fraction of each stage, in [0, 1); one more than `borders`.
        borders: progress at which each stage but the first begins, rising, in (0, 1).

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
        """Return the drop fraction at `progress`."""
        return self.shares[bisect.bisect_right(self.borders, progress)]


@dataclass(frozen=True)
class DropTo:
    """Drop fraction with which an update keeps `density` of the weights, and grows back to the schedule's density.

    Attributes:
        density: share of all weights that an update keeps, in (0, 1].

    """

    density: float

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def __call__(self, progress: float, density: float) -> float:
        """Return the share of `density` that exceeds the kept density; 0 if nothing does."""
        return max(0.0, 1.0 - self.density / density)
