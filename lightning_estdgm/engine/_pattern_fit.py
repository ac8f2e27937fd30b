"""Layers that a pattern does not fit, such as N:M on a first convolution of 3 channels: they stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.method._masks import mask_shape
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
