"""Budgets of layers that follow the scores at a mask update. Pure functions of all layers' scores.

`_distributions` gives layers their budgets by shape alone; a redistribution replaces these at mask updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_estdgm.method._masks import active_units, kept_units, top_k


@dataclass(frozen=True)
class Scored:
    """Mask and scores of one layer, or of one part of it, before an update; tensors have the mask's shape.

    Attributes:
        mask: bool, true for active units.
        keep: score by which active units stay.
        grow: score by which units are grown.

    """

    mask: Tensor
    keep: Tensor
    grow: Tensor


@dataclass(frozen=True)
class Budget:
    """Numbers of units that an update leaves in a layer, or in one part of it.

    Attributes:
        keep: number of active units that stay.
        k: number of active units after the update.

    """

    keep: int
    k: int


def globally(layers: Sequence[Scored], k: int, drop_fraction: float, regrow: bool) -> list[Budget]:
    """Give each layer as many units as it has among the `k` best of all layers: global pruning.

    Active units come first, by keep score; where `k` is more than these, inactive ones follow by growth score. Each
    layer has at least one. Within its budget a layer then drops and grows `drop_fraction`, as without redistribution.

    Args:
        layers: all masked layers.
        k: number of active units of all layers together.
        drop_fraction: see `_masks.kept_units`.
        regrow: see `_masks.drop_and_grow`.

    """
    masks = torch.cat([layer.mask.flatten() for layer in layers])
    keep = torch.cat([_best_first(layer.keep.masked_fill(~layer.mask, -torch.inf)) for layer in layers])
    chosen = top_k(keep, min(k, active_units(masks)))
    if k > active_units(masks):
        grow = torch.cat([layer.grow.flatten() for layer in layers])
        chosen = masks | top_k(grow.masked_fill(masks, -torch.inf), k - active_units(masks))
    counts = [max(1, active_units(part)) for part in chosen.split([layer.mask.numel() for layer in layers])]
    active = [active_units(layer.mask) for layer in layers]
    return [
        Budget(kept_units(n, layer.mask.numel() - n, count, drop_fraction, regrow=regrow), count)
        for layer, n, count in zip(layers, active, counts, strict=True)
    ]


def by_growth(layers: Sequence[Scored], k: int, drop_fraction: float, regrow: bool) -> list[Budget]:
    """Split the units to grow in proportion to the mean growth score of each layer's active units: SNFS.

    Each layer drops `drop_fraction` of its own units; the units to grow are split by largest remainders. Those that a
    layer has no room for go to the others in the same proportion. If all scores are 0, the split is by dropped units.

    Args:
        layers: all masked layers.
        k: number of active units of all layers together.
        drop_fraction: share of each layer's active units that it drops, in [0, 1].
        regrow: see `_masks.drop_and_grow`.

    Raises:
        ValueError: if `k` is less than the units that stay, or more than there is room for.

    """
    active = [active_units(layer.mask) for layer in layers]
    keep = [n - int(drop_fraction * n) for n in active]
    left = k - sum(keep)
    if left < 0:
        raise ValueError(
            f"redistribution by growth needs a density that does not fall: {sum(keep)} units stay of {k}; take a "
            "schedule whose density stays or rises, a larger drop_fraction=, or another redistribute="
        )
    room = [x.mask.numel() - (n if regrow else a) for x, n, a in zip(layers, keep, active, strict=True)]
    if left > sum(room):
        raise ValueError(f"{left} units are to be grown where {sum(room)} were inactive: set regrow=True or drop less")
    means = [float(x.grow.double()[x.mask].mean()) if n else 0.0 for x, n in zip(layers, active, strict=True)]
    if not sum(means) > 0.0:
        means = [float(n - kept) for n, kept in zip(active, keep, strict=True)]
    grown = [0] * len(layers)
    while left > 0:
        open_ = [i for i in range(len(layers)) if grown[i] < room[i]]
        total = sum(means[i] for i in open_)
        shares = [left * means[i] / total if total > 0.0 else left / len(open_) for i in open_]
        extra = [min(int(share), room[i] - grown[i]) for i, share in zip(open_, shares, strict=True)]
        order = sorted(range(len(open_)), key=lambda j: (int(shares[j]) - shares[j], j))
        if not any(int(share) > n for share, n in zip(shares, extra, strict=True)):  # nobody is full: remainders
            for j in order[: left - sum(extra)]:
                extra[j] += grown[open_[j]] + extra[j] < room[open_[j]]
        for i, n in zip(open_, extra, strict=True):
            grown[i] += n
        left -= sum(extra)
    return [Budget(kept, kept + n) for kept, n in zip(keep, grown, strict=True)]


def _best_first(scores: Tensor) -> Tensor:
    """Return flat scores with the largest raised to infinity, so that every layer keeps one unit."""
    flat = scores.flatten().clone()
    flat[flat.argmax()] = torch.inf
    return flat


Redistribution = Callable[[Sequence[Scored], int, float, bool], list[Budget]]
RedistributionName = Literal["global", "growth"]
"""Names of `REDISTRIBUTIONS`, for LightningCLI."""

REDISTRIBUTIONS: dict[str, Redistribution] = {"global": globally, "growth": by_growth}
"""Known redistributions by name; `UpdateRule.redistribute` also takes such a function itself."""
