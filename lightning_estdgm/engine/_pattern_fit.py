"""Fit of a pattern: layers that do not divide into its groups stay dense, a density that it cannot hold is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._masks import mask_shape
from lightning_estdgm.method._patterns import Pattern, fitted
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._mask_unit import unit_of


def leave_unfitting_dense(candidates: Sequence[Candidate], config: DGMConfig) -> tuple[Candidate, ...]:
    """Return the candidates, those that do not divide into the pattern's groups unmasked and with that reason.

    Raises:
        ValueError: if a layer that `include` names does not fit, or no masked layer does.

    """
    pattern = config.update_rule.pattern
    if pattern is None:
        return tuple(candidates)
    fitting, errors = [], {}
    for candidate in candidates:
        if candidate.masked:
            try:
                block_size, _ = unit_of(candidate, config.units.size)
            except ValueError:
                if not candidate.seems_head:
                    raise
                fitting.append(candidate)  # a unit that does not fit it is none of this module's business
                continue
            try:
                pattern.group_size(torch.Size(mask_shape(candidate.part_shape, block_size)))
            except ValueError as error:
                errors[candidate.name] = str(error)
                if candidate.why == "included":
                    raise ValueError(
                        f"layer {candidate.name!r}: {error}; it is named in include=, leave it out to keep it dense"
                    ) from error
        why = errors.get(candidate.name)
        fitting.append(candidate if why is None else replace(candidate, masked=False, why=why, parts=1))
    if errors and not any(candidate.masked and not candidate.seems_head for candidate in fitting):
        raise ValueError(f"the pattern {pattern} fits no layer: {errors}; pass another UpdateRule(pattern=...)")
    return tuple(fitting)


def check_pattern(pattern: Pattern | None, weights: Sequence[MaskedWeight], budgets: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if a pattern does not fit a weight, or not with its number of active units.

    Args:
        pattern: pattern of all masks; ``None``: none.
        weights: weights that will be masked.
        budgets: number of active units of each part of each weight.

    """
    if pattern is None:
        return
    for weight, budget in zip(weights, budgets, strict=True):
        with weight.naming_errors():
            for k in budget:
                fitted(pattern, torch.Size(mask_shape(weight.candidate.part_shape, weight.block_size)), k)
