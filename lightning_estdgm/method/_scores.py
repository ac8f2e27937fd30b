"""Scores of mask units, by which units are kept or grown. Pure functions of tensors; choosing by them is in `_masks`.

A *unit* is one weight, or a ``b x b`` block of a weight matrix, which is active or inactive as a whole. Scores have the
mask's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """Measurements of the units of one layer before a mask update; tensors have the mask's shape.

    Attributes:
        mask: bool, true for active units.
        weight: norm of each unit's weights.
        mean_gradient: norm of each unit's gradient, averaged over the window; 0 where nothing was observed.
        mean_norm: norms of each unit's gradients, averaged over the window; 0 where nothing was observed.
        gamma: exponent of the directional consistency; `UpdateRule.gamma`.
        generator: generator on the CPU, seeded by `DGMConfig.seed`, the update and the layer: the same on every rank
            and in a resumed run.

    """

    mask: Tensor
    weight: Tensor
    mean_gradient: Tensor
    mean_norm: Tensor
    gamma: float
    generator: torch.Generator


@dataclass(frozen=True)
class WeightAndGradient:
    r"""The score :math:`\lVert w \rVert + \lambda \overline{\lVert g \rVert}` of MEST (Yuan et al., arXiv 2110.14032).

    Attributes:
        scale: factor lambda of the gradient's norm, at least 0.
        relative: whether both norms are divided by their mean over the active units, so that lambda means the same
            whatever the scale of loss and weights. A norm whose mean is 0 is taken as it is.

    """

    scale: float = 1.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0.0):
            raise ValueError(f"scale must be a finite number of at least 0, got {self.scale!r}")

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores."""
        weight, gradient = evidence.weight, evidence.mean_norm
        if self.relative:
            weight, gradient = (_over_mean(x, evidence.mask) for x in (weight, gradient))
        return weight + self.scale * gradient


def _over_mean(norms: Tensor, mask: Tensor) -> Tensor:
    """Return norms divided by their mean over the active units; unchanged where that is 0."""
    mean = norms[mask].mean() if mask.any() else norms.new_zeros(())
    return norms / torch.where(mean > 0, mean, 1.0)


def consistency(mean_gradient_norm: Tensor, mean_norm: Tensor) -> Tensor:
    r"""Return the directional consistency :math:`C = \lVert \bar g \rVert / \overline{\lVert g \rVert}`, in [0, 1].

    1 where every observed gradient of a unit points the same way, 0 where they cancel. For a single weight this is
    ``|mean g| / mean|g|``; for a block the unit's gradient is taken as one vector, so the triangle inequality keeps the
    ratio within [0, 1]. Units without any gradient score 0.

    Args:
        mean_gradient_norm: norm of the mean gradient of each unit.
        mean_norm: mean over observations of the norm of each unit's gradient.

    """
    smallest = torch.finfo(mean_norm.dtype).tiny  # a normal number: it stays above 0 where subnormals are flushed
    return (mean_gradient_norm / mean_norm.clamp_min(smallest)).clamp_(0.0, 1.0)


def growth(mean_gradient_norm: Tensor, mean_norm: Tensor, gamma: float) -> Tensor:
    r"""Return the growth score :math:`A \cdot C^\gamma`, with magnitude :math:`A = \overline{\lVert g \rVert}`.

    ``gamma=0`` is RigL's rule, averaged over the window; ``gamma=1`` ranks by the norm of the mean gradient.

    Args:
        mean_gradient_norm: norm of the mean gradient of each unit.
        mean_norm: mean over observations of the norm of each unit's gradient.
        gamma: weight of the consistency, at least 0.

    """
    return mean_norm * consistency(mean_gradient_norm, mean_norm) ** gamma


def _random(evidence: Evidence) -> Tensor:
    noise = torch.rand(evidence.mask.shape, generator=evidence.generator, device="cpu")
    return noise.to(evidence.mask.device)


ScoreName = Literal["magnitude", "gradient", "momentum", "consistency", "weight_and_gradient", "random"]
"""Names of `SCORES`, for LightningCLI."""

SCORES: dict[str, Callable[[Evidence], Tensor]] = {
    "magnitude": lambda evidence: evidence.weight,
    "gradient": lambda evidence: evidence.mean_norm,
    "momentum": lambda evidence: evidence.mean_gradient,
    "consistency": lambda evidence: growth(evidence.mean_gradient, evidence.mean_norm, evidence.gamma),
    "weight_and_gradient": WeightAndGradient(relative=True),
    "random": _random,
}
"""Known scores by name; `UpdateRule.keep` and `UpdateRule.grow` also take such a function itself."""

WITHOUT_GRADIENTS = frozenset({"magnitude", "random"})
"""Scores that need no observation window."""

WITHOUT_MEAN_GRADIENT = WITHOUT_GRADIENTS | {"gradient", "weight_and_gradient"}
"""Scores that need no sum of the window's gradients: the norms of their units are enough."""
