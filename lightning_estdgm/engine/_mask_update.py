"""Mask updates: the units of every weight that stay and that are grown, chosen from weights and observation windows.

Scores, drop-and-grow and redistribution are in `method`; here they are applied to weights, whole or sharded. First
masks are those of `_initialisation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import all_reduce
from lightning_estdgm.distributed._top_k import Ranking, top_k
from lightning_estdgm.method._masks import active_units, drop_and_grow, kept_units
from lightning_estdgm.method._patterns import drop_and_grow_in_groups, fitted
from lightning_estdgm.method._redistribution import Budget, Scored
from lightning_estdgm.method._scores import Evidence
from lightning_estdgm.method._update_rule import UpdateRule

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight


def update_masks(
    weights: Sequence[MaskedWeight],
    budgets: Sequence[Sequence[int]],
    drop_fraction: float,
    rule: UpdateRule,
    *,
    seed: int,
    update: int = 0,
) -> Iterator[tuple[MaskedWeight, Tensor, int]]:
    """Update the masks of all weights by their scores, and end the observation windows.

    If weights are sharded, all ranks must exhaust the iterator; they come to the same masks: the norms of blocks are
    summed in one all-reduce, and single weights are ranked by `distributed._top_k`.

    Args:
        weights: masked weights of the model.
        budgets: number of active units of each part of each weight; a redistribution keeps to their sum.
        drop_fraction: see `_masks.kept_units`.
        rule: update rule; sharded weights must pass `UpdateRule.check_sharded`.
        seed: seed of random scores.
        update: index of the update, for random scores.

    Yields:
        Each weight with its new mask, the units whose state changed (bool of the mask's shape), and the number of units
        that were grown.

    Raises:
        ValueError: if a layer holds NaN weights, or does not fit the rule.

    """
    choice = _Choice(drop_fraction, rule, seed, update)
    evidence = _shared_evidence(weights)
    ranked = {w: k for w, k in zip(weights, budgets, strict=True) if w.placement.mask_is_local}
    kept = {w: choice.kept(w, k) for w, k in ranked.items()}
    local_masks = choice.ranked(ranked, kept)
    scored: dict[MaskedWeight, list[Scored]] = {}
    redistributed: Iterator[Budget] | None = None
    if rule.redistribution is not None:  # needs all weights' scores at once
        scored = {w: choice.scored(w, len(k)) for w, k in zip(weights, budgets, strict=True)}
        every = [part for parts in scored.values() for part in parts]
        redistributed = iter(rule.redistribution(every, sum(map(sum, budgets)), drop_fraction, rule.regrow))
    for weight, budget in zip(weights, budgets, strict=True):
        old = weight.mask
        if weight in local_masks:
            keep, grow = local_masks[weight]
            weight.set_local_mask(keep() | grow(), sum(budget))
            weight.part_active = list(budget)
            grown = sum(budget) - sum(kept[weight])
            if rule.regrow:  # some of them were active before
                grown = int(all_reduce([weight.shard], [(weight.mask & ~old).sum()[None]])[0])
        else:
            parts = scored.pop(weight, []) or choice.scored(weight, len(budget), evidence.get(weight))
            if redistributed is None:
                limits = [choice.limits(weight, part, k) for part, k in zip(parts, budget, strict=True)]
            else:
                limits = [next(redistributed) for _ in parts]
            mask = torch.cat([choice.mask(weight, part, limit) for part, limit in zip(parts, limits, strict=True)])
            weight.set_local_mask(mask, active_units(mask))
            grown = active_units(weight.mask & ~old)
        weight.explored |= weight.mask
        weight.window = None
        yield weight, old ^ weight.mask, grown
    counts = all_reduce([w.shard for w in ranked], [w.explored.sum()[None] for w in ranked])
    for weight, count in zip(ranked, counts, strict=True):
        weight.explored_units = int(count)


def _shared_evidence(weights: Sequence[MaskedWeight]) -> dict[MaskedWeight, Tensor]:
    """Return the summed messages of the weights whose ranks share any (`Placement.evidence`), in one all-reduce."""
    messages: dict[MaskedWeight, Tensor] = {}
    for weight in weights:
        message = weight.placement.evidence(weight.weight, weight.seen_gradient)
        if message is not None:
            messages[weight] = message
    sums = all_reduce([weight.shard for weight in messages], list(messages.values()))
    for weight, summed in zip(messages, sums, strict=True):
        _refuse_nan(weight, summed)
    return dict(zip(messages, sums, strict=True))


def _refuse_nan(weight: MaskedWeight, evidence: Tensor) -> None:
    if weight.placement.holds_nan(evidence):
        raise ValueError(
            f"the run has diverged: layer {weight.name!r} holds NaN weights at a mask update: "
            "begin again from an earlier checkpoint with a lower learning rate, or clip gradients (gradient_clip_val=)"
        )


class _Choice:
    """Choice of the units at one mask update: its rule, drop fraction and seed, applied to one weight at a time."""

    def __init__(self, drop_fraction: float, rule: UpdateRule, seed: int, update: int) -> None:
        self._drop_fraction, self._rule = drop_fraction, rule
        self._seed, self._update = seed, update

    def kept(self, weight: MaskedWeight, budget: Sequence[int]) -> list[int]:
        """Return the number of active units of each part that stay, for single weights of a sharded weight."""
        size = weight.units // weight.candidate.parts
        share = self._share(weight)
        return [
            kept_units(n, size - n, k, share, regrow=self._rule.regrow)
            for n, k in zip(weight.part_active, budget, strict=True)
        ]

    def limits(self, weight: MaskedWeight, part: Scored, k: int) -> Budget:
        """Return the budget of one part where nothing is redistributed."""
        n, share = active_units(part.mask), self._share(weight)
        if self._rule.pattern is not None:
            with weight.naming_errors():
                k = fitted(self._rule.pattern, part.mask.shape, k)
            if weight.inactive.learn:
                return Budget(n, k)
        return Budget(kept_units(n, part.mask.numel() - n, k, share, regrow=self._rule.regrow), k)

    def mask(self, weight: MaskedWeight, part: Scored, budget: Budget) -> Tensor:
        """Return the new mask of one part."""
        pattern = self._rule.pattern
        if pattern is None:
            return drop_and_grow(part.mask, part.keep, part.grow, budget.k, budget.keep, regrow=self._rule.regrow)
        with weight.naming_errors():
            return drop_and_grow_in_groups(pattern, part.mask, part.keep, part.grow, budget.k, budget.keep)

    def scored(self, weight: MaskedWeight, parts: int, evidence: Tensor | None = None) -> list[Scored]:
        """Return the scores of each part of a weight with a whole mask, from its ranks' summed message if any."""
        norms = weight.placement.score_norms(weight.weight, weight.seen_gradient, evidence)
        if evidence is None:
            _refuse_nan(weight, norms[0])
        digest = hashlib.sha256(f"{self._seed}/{self._update}/{weight.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        seen = self._seen(weight, *norms, generator)
        # Where inactive weights learn, all units may be kept.
        mask = torch.ones_like(seen.mask) if weight.inactive.learn else seen.mask
        keep, grow = self._rule.keep_by(weight.block_size), self._rule.grow
        found = (mask, self._rule.score(keep, seen), self._rule.score(grow, seen))
        return [Scored(*part) for part in zip(*(x.chunk(parts) for x in found), strict=True)]

    def ranked(
        self, budgets: Mapping[MaskedWeight, Sequence[int]], kept: Mapping[MaskedWeight, Sequence[int]]
    ) -> dict[MaskedWeight, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        """Return functions to this rank's part of the kept and of the grown units, for sharded single weights."""
        rule = self._rule

        def keeping(weight: MaskedWeight) -> Ranking:
            scores = partial(self._local_scores, weight, rule.keep_by(1), lambda: ~weight.mask)
            return Ranking(weight.shard, scores, kept[weight])

        def growing(weight: MaskedWeight, taken: Tensor | None) -> Ranking:
            counts = [n - m for n, m in zip(budgets[weight], kept[weight], strict=True)]
            scores = partial(self._local_scores, weight, rule.grow, lambda: weight.mask if taken is None else taken)
            return Ranking(weight.shard, scores, counts)

        if not rule.regrow:  # both at once, in as few collectives
            chosen = top_k([keeping(w) for w in budgets] + [growing(w, None) for w in budgets])
            return {w: (chosen[i], chosen[i + len(budgets)]) for i, w in enumerate(budgets)}
        stay = top_k([keeping(w) for w in budgets])
        grow = top_k([growing(w, taken()) for w, taken in zip(budgets, stay, strict=True)])
        return dict(zip(budgets, zip(stay, grow, strict=True), strict=True))

    def _share(self, weight: MaskedWeight) -> float:
        """Return the drop fraction; 0 for a weight that needs observed gradients and has none."""
        by_gradients = self._rule.needs_gradients(weight.block_size)
        return self._drop_fraction if weight.window is not None or not by_gradients else 0.0

    def _local_scores(
        self, weight: MaskedWeight, which: str | Callable[[Evidence], Tensor], taken: Callable[[], Tensor]
    ) -> Tensor:
        """Return scores of this rank's part of a sharded weight, ``-inf`` for `taken` units."""
        by_magnitude = which == "magnitude"  # called in many passes, so gradients that it does not need are left out
        gradient = None if by_magnitude else weight.seen_gradient
        norms = weight.placement.score_norms(weight.weight, gradient, None)
        if by_magnitude:
            return norms[0].masked_fill(taken(), -torch.inf)
        return self._rule.score(which, self._seen(weight, *norms, torch.Generator())).masked_fill(taken(), -torch.inf)

    def _seen(
        self, weight: MaskedWeight, weight_norm: Tensor, gradient_norm: Tensor | None, generator: torch.Generator
    ) -> Evidence:
        """Return the measurements for scores; `gradient_norm` is the norm of the window's sum."""
        window = weight.window
        if window is None or gradient_norm is None:
            mean_gradient = mean_norm = torch.zeros(weight.mask.shape, device=weight.mask.device)
        else:
            mean_gradient, mean_norm = gradient_norm / window.samples, window.norm / window.samples
        return Evidence(weight.mask, weight_norm, mean_gradient, mean_norm, self._rule.gamma, generator)
