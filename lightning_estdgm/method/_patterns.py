"""Patterns of active units within a layer: N:M, constant fan-in. Pure: tensors in, tensors out.

A pattern sorts the units of a layer into groups of equal size and says how many of each group are active. Passed as
`UpdateRule.pattern`; without one, a layer's active units may lie anywhere in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import top_k, top_k_in_groups


class Pattern(ABC):
    """What `draw` and `exchange_in_groups` ask of a pattern; a frozen dataclass with these methods is all it takes."""

    @abstractmethod
    def group_size(self, shape: torch.Size) -> int:
        """Return how many units a group has, for a mask of `shape`; groups lie along the inputs.

        Raises:
            ValueError: if the shape cannot be cut up so.

        """

    @abstractmethod
    def per_group(self, k: int, groups: int, size: int) -> int:
        """Return how many units of each group are active, for `k` units of `groups` groups of `size`.

        Raises:
            ValueError: if `k` cannot be spread so.

        """

    @abstractmethod
    def quotas(self, n: int, salient: Tensor) -> Tensor:
        """Return how many units of each group are active now, should groups differ.

        Args:
            n: what `per_group` returned.
            salient: bool ``(groups, size)``, true where a unit would stay or be grown without the pattern.

        Returns:
            Integers of shape ``(groups,)``, each at most ``size``.

        """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        methods = ("group_size", "per_group", "quotas")
        if cls is not Pattern:
            return NotImplemented
        return all(callable(getattr(other, method, None)) for method in methods)


@dataclass(frozen=True)
class NofM(Pattern):
    """N:M: of each `m` neighbours along the inputs the same number is active, n = density * m.

    The layer's density must make n a whole number: use ``distribution="uniform"`` and a density of n / m.

    Attributes:
        m: units in a group, at least 2.

    """

    m: int

    def __post_init__(self) -> None:
        if type(self.m) is not int or self.m < 2:
            raise ValueError(f"m must be an int of at least 2, got {self.m!r}")

    def group_size(self, shape: torch.Size) -> int:
        """Return `m`."""
        if shape[1] % self.m:
            raise ValueError(f"N:{self.m} needs inputs that are a multiple of {self.m}, got a mask of {tuple(shape)}")
        return self.m

    def per_group(self, k: int, groups: int, size: int) -> int:
        """Return n."""
        n, rest = divmod(k, groups)
        if rest:
            raise ValueError(
                f"N:{self.m} needs a density that is a whole number of {self.m}ths in every layer, got "
                f"{k / (groups * size):g}"
            )
        return n

    def quotas(self, n: int, salient: Tensor) -> Tensor:
        """Return n for each group."""
        return torch.full(salient.shape[:1], n, device=salient.device)


@dataclass(frozen=True)
class FanIn(Pattern):
    """Constant fan-in: every output has the same number of active units; SRigL (Lasby et al., arXiv 2305.02299).

    Attributes:
        ablate: an output goes out altogether, and its units to the others, when fewer than this share of its fan-in
            are salient, in [0, 1); 0 turns it off. Decided anew at every update.

    """

    ablate: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ablate < 1.0:
            raise ValueError(f"ablate must lie in [0, 1), got {self.ablate!r}")

    def group_size(self, shape: torch.Size) -> int:
        """Return the units of one output."""
        return shape[1:].numel()

    def per_group(self, k: int, groups: int, size: int) -> int:
        """Return the fan-in: to the nearest unit, at least one."""
        return max(1, round(k / groups))

    def quotas(self, n: int, salient: Tensor) -> Tensor:
        """Return the fan-in of each output: 0 where too little is salient, and what that leaves, to the others."""
        outputs, size = salient.shape
        counts = salient.sum(1)
        alive = counts >= self.ablate * n
        if not alive.any():
            alive = counts == counts.max()
        return torch.where(alive, min(size, n * outputs // int(alive.sum())), 0)


def fitted(pattern: Pattern, shape: torch.Size, k: int) -> int:
    """Return how many units of a mask of `shape` are active under the pattern, for a budget of `k`."""
    size = pattern.group_size(shape)
    groups = shape.numel() // size
    return groups * pattern.per_group(k, groups, size)


def draw(pattern: Pattern, scores: Tensor, k: int) -> Tensor:
    """Return a mask in the pattern, of the largest scores of each group; no group is left out."""
    grouped = _grouped(pattern, scores)
    counts = torch.full(grouped.shape[:1], pattern.per_group(k, *grouped.shape), device=scores.device)
    return _ungrouped(top_k_in_groups(grouped, counts), scores.shape)


def exchange_in_groups(
    pattern: Pattern, mask: Tensor, keep_scores: Tensor, grow_scores: Tensor, k: int, keep: int
) -> Tensor:
    """Re-decide a mask within a pattern.

    The `keep` active units of largest keep score in the layer stay, as far as their group's quota goes, the largest
    first; each group is then filled up by the largest growth scores of all its other units. Salient are the kept ones,
    and as many of the layer's largest growth scores as active ones were dropped.

    Args:
        pattern: of the layer.
        mask: the mask so far.
        keep_scores: of the mask's shape; only active units' are read.
        grow_scores: of the mask's shape.
        k: active units that the budget gives the layer; quotas may round it.
        keep: how many stay at most.

    Raises:
        ValueError: if the layer or the budget does not fit the pattern, or a score is NaN.

    """
    kept = top_k(keep_scores.masked_fill(~mask, -torch.inf), keep)
    dropped = max(0, int(torch.count_nonzero(mask)) - keep)
    salient = kept | top_k(grow_scores, dropped)
    salient = _grouped(pattern, salient)
    quotas = pattern.quotas(pattern.per_group(k, *salient.shape), salient)
    kept_, keep_, grow_ = (_grouped(pattern, x) for x in (kept, keep_scores, grow_scores))
    stay = top_k_in_groups(keep_.masked_fill(~kept_, -torch.inf), torch.minimum(quotas, kept_.sum(1)))
    new = top_k_in_groups(grow_.masked_fill(stay, -torch.inf), quotas - stay.sum(1))
    return _ungrouped(stay | new, mask.shape)


def _grouped(pattern: Pattern, units: Tensor) -> Tensor:
    """Return ``(groups, size)``: the inputs last, so that groups lie along them whatever the kernel."""
    size = pattern.group_size(units.shape)
    return units.movedim(1, -1).reshape(-1, size)


def _ungrouped(grouped: Tensor, shape: torch.Size) -> Tensor:
    moved = (shape[0], *shape[2:], shape[1])
    return grouped.view(moved).movedim(-1, 1).contiguous()
