"""How mask updates choose: the scores, the pattern and the redistribution that make up a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_estdgm.method.patterns import Pattern
from lightning_estdgm.method.redistribution import Redistribution
from lightning_estdgm.method.scores import SCORES, WITHOUT_GRADIENTS, Evidence

__all__ = ["AUTO", "Rule"]

AUTO = "auto"
"""Keep single weights by magnitude, blocks by weight and gradient: the norms of blocks differ too little to tell."""

_OVER_RANKS = frozenset({"magnitude", "gradient", "momentum", "consistency"})
"""Scores that ranks can tell of their part of a sharded weight: unit by unit, and without chance.

Blocks' norms are summed over ranks first, so of them all is known that needs no chance.
"""


@dataclass(frozen=True)
class Rule:
    """How mask updates choose.

    Attributes:
        keep: name in `scores.SCORES`, or a function, by which active units stay; or `AUTO`.
        grow: by which units are grown.
        gamma: see `scores.growth`.
        regrow: see `masks.exchange`.
        pattern: of the active units of a layer; ``None``: anywhere.
        redistribute: moves units between layers at updates; ``None``: budgets are given.
        seed: of random scores.

    """

    keep: str | Callable[[Evidence], Tensor] = AUTO
    grow: str | Callable[[Evidence], Tensor] = "consistency"
    gamma: float = 1.0
    regrow: bool = False
    pattern: Pattern | None = None
    redistribute: Redistribution | None = None
    seed: int = 0

    def keep_by(self, block_size: int) -> str | Callable[[Evidence], Tensor]:
        """Return the score by which units of that size stay: what `AUTO` stands for."""
        if self.keep != AUTO:
            return self.keep
        return "magnitude" if block_size == 1 else "weight_and_gradient"

    def needs_gradients(self, block_size: int) -> bool:
        """Whether anything about units of that size is decided by observed gradients."""
        scores = self.keep_by(block_size), self.grow
        return not all(isinstance(x, str) and x in WITHOUT_GRADIENTS for x in scores)

    @property
    def moves_budgets(self) -> bool:
        """Whether layers may come to other densities than the schedule and the distribution give them."""
        return self.pattern is not None or self.redistribute is not None

    def check_sharded(self, name: str, block_size: int) -> None:
        """Raise ValueError if a weight that is spread over ranks cannot be updated by this rule."""
        known = _OVER_RANKS if block_size == 1 else _OVER_RANKS | {"weight_and_gradient"}
        found = [
            f"{what}={score!r}"
            for what, score in (("keep", self.keep_by(block_size)), ("grow", self.grow))
            if not (isinstance(score, str) and score in known)
        ]
        found += [
            f"{what}={getattr(self, what)!r}" for what in ("pattern", "redistribute") if getattr(self, what) is not None
        ]
        if found:
            raise ValueError(
                f"layer {name!r} is sharded over ranks, where masks are updated by the scores {sorted(known)}, "
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
