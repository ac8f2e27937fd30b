"""How mask updates choose: the scores, the pattern and the redistribution that make up a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_estdgm.patterns import Pattern
from lightning_estdgm.redistribution import Redistribution
from lightning_estdgm.scores import SCORES, WITHOUT_GRADIENTS, Evidence

__all__ = ["Rule"]

_OVER_RANKS = frozenset({"magnitude", "gradient", "momentum", "consistency"})
"""Scores that ranks can tell of their part of a sharded weight: unit by unit, and without chance."""


@dataclass(frozen=True)
class Rule:
    """How mask updates choose.

    Attributes:
        keep: name in `scores.SCORES`, or a function, by which active units stay.
        grow: by which units are grown.
        gamma: see `scores.growth`.
        regrow: see `masks.exchange`.
        pattern: of the active units of a layer; ``None``: anywhere.
        redistribute: moves units between layers at updates; ``None``: budgets are given.
        seed: of random scores.

    """

    keep: str | Callable[[Evidence], Tensor] = "magnitude"
    grow: str | Callable[[Evidence], Tensor] = "consistency"
    gamma: float = 1.0
    regrow: bool = False
    pattern: Pattern | None = None
    redistribute: Redistribution | None = None
    seed: int = 0

    @property
    def needs_gradients(self) -> bool:
        """Whether anything is decided by observed gradients."""
        return not all(isinstance(x, str) and x in WITHOUT_GRADIENTS for x in (self.keep, self.grow))

    @property
    def moves_budgets(self) -> bool:
        """Whether layers may come to other densities than the schedule and the distribution give them."""
        return self.pattern is not None or self.redistribute is not None

    def check_sharded(self, name: str) -> None:
        """Raise ValueError if a weight that is spread over ranks cannot be updated by this rule."""
        found = [
            f"{what}={score!r}"
            for what, score in (("keep", self.keep), ("grow", self.grow))
            if not (isinstance(score, str) and score in _OVER_RANKS)
        ]
        found += [
            f"{what}={getattr(self, what)!r}" for what in ("pattern", "redistribute") if getattr(self, what) is not None
        ]
        if found:
            raise ValueError(
                f"layer {name!r} is sharded over ranks, where masks are updated by the scores {sorted(_OVER_RANKS)}, "
                f"without pattern or redistribution; got {', '.join(found)}: use DDP"
            )

    def score(self, which: str | Callable[[Evidence], Tensor], evidence: Evidence) -> Tensor:
        """Return the scores of a name or function, checked.

        Raises:
            ValueError: if a function's result is not of the mask's shape or is NaN.

        """
        if isinstance(which, str):
            return SCORES[which](evidence)
        result = which(evidence)
        if result.shape != evidence.mask.shape:
            raise ValueError(
                f"score {which!r} must return one number a unit, of shape {tuple(evidence.mask.shape)}, got "
                f"{tuple(result.shape)}"
            )
        if result.isnan().any():
            raise ValueError(f"score {which!r} must not be NaN")
        return result
