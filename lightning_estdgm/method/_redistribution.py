"""Budgets of layers that move with what an update sees: functions of all layers' scores. Pure.

`_distributions` gives layers their shares by shape alone; a redistribution replaces that at mask updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.method._masks import active_units, kept_units, top_k


@dataclass(frozen=True)
class Scored:
    """One layer, or one part of one, before an update; tensors have the mask's shape.

    Attributes:
        mask: bool, true where active so far.
        keep: score by which active units stay.
        grow: score by which units are grown.

    """

    mask: Tensor
    keep: Tensor
    grow: Tensor


@dataclass(frozen=True)
class Budget:
    """What an update leaves a layer.

    Attributes:
        keep: how many active units stay.
        k: how many are active afterwards.

    """

    keep: int
    k: int


def globally(layers: Sequence[Scored], k: int, drop_fraction: float, regrow: bool) -> list[Budget]:
    """Give each layer as many units as it has among the `k` best of all layers: global pruning.

    Active units come first, by keep score; where `k` is more than these, inactive ones follow by growth score. Each
    layer has at least one. Of its budget a layer then gives up and grows back its share, as without redistribution.

    Args:
        layers: all of them.
        k: active units of the whole.
        drop_fraction: see `_masks.decide`.
        regrow: see `_masks.exchange`.

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
    """Share out what all layers dropped in proportion to the mean growth score of each layer's active units: SNFS.

    Each layer drops its share of its own units; what is to grow is split by largest remainders. What a layer cannot
    hold goes to the others in the same proportion. Where all scores are 0, the split is by dropped units.

    Args:
        layers: all of them.
        k: active units of the whole.
        drop_fraction: share of each layer's active units that it drops, in [0, 1].
        regrow: see `_masks.exchange`.

    Raises:
        ValueError: if `k` is less than what stays, or more than there is room for.

    """
    active = [active_units(layer.mask) for layer in layers]
    keep = [n - int(drop_fraction * n) for n in active]
    left = k - sum(keep)
    if left < 0:
        raise ValueError(f"redistribution by growth needs a density that does not fall: {sum(keep)} units stay of {k}")
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
    """Return flat scores with the best raised above all, so that every layer keeps it."""
    flat = scores.flatten().clone()
    flat[flat.argmax()] = torch.inf
    return flat


Redistribution = Callable[[Sequence[Scored], int, float, bool], list[Budget]]
REDISTRIBUTIONS: dict[str, Redistribution] = {"global": globally, "growth": by_growth}
"""Known redistributions by name; `UpdateRule.redistribute` also takes such a function itself."""
