"""`UpdateRule`: the settings of mask updates: scores, drop fraction, pattern and redistribution.

It names and checks them; they are computed in `_scores`, `_patterns` and `_redistribution`, and applied to a model's
weights by `engine._mask_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_estdgm._checks import check_fraction, check_number
from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.method._patterns import Pattern
from lightning_estdgm.method._redistribution import REDISTRIBUTIONS, Redistribution, RedistributionName
from lightning_estdgm.method._scores import (
    SCORES,
    WITHOUT_GRADIENTS,
    WITHOUT_MEAN_GRADIENT,
    Evidence,
    ScoreName,
    WeightAndGradient,
)

AUTO = "auto"
"""Keep fine units by magnitude, blocks by weight and gradient: the norms of blocks differ too little alone."""

_COARSE = 16 * 16
"""Weights of a unit from which it counts as a block."""

_OVER_RANKS = frozenset({"magnitude", "gradient", "momentum", "consistency"})
"""Scores that each rank can compute for its part of a sharded weight: from one unit alone, without random numbers.

The norms of blocks are summed over ranks first, so every rank knows those of all blocks, and blocks may also be scored
by ``"weight_and_gradient"``, which needs their mean.
"""


@dataclass(frozen=True)
class UpdateRule:
    """Choice of the active units at a mask update.

    Attributes:
        keep: score by which active units stay: ``"magnitude"``, ``"gradient"``, ``"momentum"``, ``"consistency"``,
            ``"weight_and_gradient"``, ``"random"``, or a function of an `Evidence`. ``"auto"``: blocks of 16 and
            more by ``"weight_and_gradient"``, finer units by ``"magnitude"``.
        grow: score by which units are grown, likewise.
        gamma: exponent of the directional consistency in the score ``"consistency"``, at least 0.
        drop_fraction: share of a layer's active units given up for new ones at an update, in [0, 1); annealed to 0 by a
            half cosine over the run. Or a function ``(progress, density) -> share``, such as `StagedDrop`.
        regrow: whether an update may grow back the units that it has just dropped; they then keep their weight.
        pattern: pattern of the active units within a layer, such as `NofM` or `FanIn`; ``None``: they may lie anywhere.
            It needs `regrow`.
        redistribute: redistribution of units between layers at updates: ``"global"``, ``"growth"``, or a function
            ``(layers, k, drop_fraction, regrow) -> budgets`` of `Scored` layers to a `Budget` each; ``None``: layers
            keep to `Units.distribution`. It needs units of one size in all layers.

    Raises:
        TypeError: if `pattern` is no `Pattern`.
        ValueError: for an unknown score or redistribution, or a number out of range.

    """

    # jsonargparse takes the first type that fits, to read a value and to print it: names come first, since it prints no
    # string as a function; then functions, since any path to one is a string too. That they return a Tensor is not said
    # here: it takes a Callable that returns a class for its factory.
    keep: Literal["auto"] | ScoreName | Callable[[Evidence], Any] | str = AUTO
    grow: ScoreName | Callable[[Evidence], Any] | str = "consistency"
    gamma: float = 1.0
    drop_fraction: float | Callable[[float, float], float] = 0.3
    regrow: bool = False
    pattern: Pattern | None = None
    redistribute: RedistributionName | Redistribution | str | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "grow"):
            score = getattr(self, name)
            known = [AUTO, *sorted(SCORES)] if name == "keep" else sorted(SCORES)
            if not callable(score) and score not in known:
                raise ValueError(f"update_rule.{name} must be one of {known} or a function, got {score!r}")
        check_number("update_rule.gamma", self.gamma, at_least=0)
        if not callable(self.drop_fraction):
            check_fraction("update_rule.drop_fraction", self.drop_fraction)
        if self.pattern is not None and (isinstance(self.pattern, type) or not isinstance(self.pattern, Pattern)):
            raise TypeError(f"update_rule.pattern must be None or a Pattern such as NofM(4), got {self.pattern!r}")
        if self.pattern is not None and not self.regrow:
            raise ValueError(f"update_rule.pattern={self.pattern!r} needs regrow=True: each group has to be filled up")
        if not (self.redistribute is None or callable(self.redistribute) or self.redistribute in REDISTRIBUTIONS):
            known = sorted(REDISTRIBUTIONS)
            raise ValueError(
                f"update_rule.redistribute must be None, one of {known} or a function, got {self.redistribute!r}"
            )

    @property
    def redistribution(self) -> Redistribution | None:
        """Function that `redistribute` is or names; ``None`` without redistribution."""
        name = self.redistribute
        return REDISTRIBUTIONS[name] if isinstance(name, str) else name

    def drop_share(self, progress: float, density: float) -> float:
        """Return the share of active units that an update gives up.

        Args:
            progress: `Schedule.drop_progress` of the update, in [0, 1].
            density: density of the whole after the update.

        Raises:
            ValueError: if the function given as `drop_fraction` returns a share outside [0, 1).

        """
        if not callable(self.drop_fraction):
            return self.drop_fraction * 0.5 * (1.0 + math.cos(math.pi * progress))
        share = self.drop_fraction(progress, density)
        if not 0.0 <= share < 1.0:
            raise ValueError(f"drop_fraction must return a share in [0, 1), got {share!r} from {self.drop_fraction!r}")
        return share

    def keep_by(self, block_size: BlockSize) -> str | Callable[[Evidence], Tensor]:
        """Return the score by which units of a block size stay, with `AUTO` resolved."""
        if self.keep != AUTO:
            return self.keep
        return "magnitude" if math.prod(sides(block_size)) < _COARSE else "weight_and_gradient"

    def needs_gradients(self, block_size: BlockSize) -> bool:
        """Whether a score of units of a block size needs observed gradients."""
        scores = self.keep_by(block_size), self.grow
        return not all(isinstance(x, str) and x in WITHOUT_GRADIENTS for x in scores)

    def needs_mean_gradient(self, block_size: BlockSize) -> bool:
        """Whether a score of units of a block size needs the mean gradient, not the mean of norms alone."""
        scores = self.keep_by(block_size), self.grow
        by_norm = WITHOUT_MEAN_GRADIENT | ({"consistency"} if self.gamma == 0.0 else set())
        return not all(isinstance(x, WeightAndGradient) or (isinstance(x, str) and x in by_norm) for x in scores)

    @property
    def moves_budgets(self) -> bool:
        """Whether updates may give layers other densities than the schedule and the distribution do."""
        return self.pattern is not None or self.redistribute is not None

    def check_sharded(self, name: str, block_size: BlockSize) -> None:
        """Raise ValueError if this rule cannot update a weight that is sharded over ranks."""
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
        """Return the scores that `which` gives: a name in `_scores.SCORES`, or a function.

        Raises:
            ValueError: if a function's result has another shape than the mask, or holds NaN.

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
            nan = int(result.isnan().sum())
            raise ValueError(
                f"score {which!r} must not be NaN, got {nan} of {result.numel()} units: return a number for each, "
                "-inf for one that is to be chosen last"
            )
        return result
