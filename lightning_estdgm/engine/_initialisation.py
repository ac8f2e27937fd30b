"""Start of a run: masked weights made, first masks drawn or recovered from weights, initial weights scaled.

Later masks are those of `_mask_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm._words import first_names
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._inactive import Treatment
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._masks import BlockSize, active_units, initial_mask, pool_norm, size_words, unit_size
from lightning_estdgm.method._patterns import Pattern, draw
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._mask_unit import UNIT_SIZES, fitting_units, unit_of

_FEWEST_ZEROS = 0.01  # of the weights: fewer are no mask's


def masked_weights(
    candidates: Sequence[Candidate],
    config: DGMConfig,
    state: Mapping[str, Any] | None,
    *,
    wait: bool = False,
    treatment: Callable[[Candidate], Treatment] | None = None,
) -> list[MaskedWeight]:
    """Return a masked weight, all units active, for each candidate that is masked.

    A layer that only seems to be the output head, and that the unit does not fit, is left out.

    Args:
        candidates: linear and convolution layers of the model.
        config: settings.
        state: state of a controller that will be loaded, or None; its units are used where they are chosen by timing.
        wait: whether the weights stay dense until they are taken in.
        treatment: treatment of a layer's inactive weights; ``None``: `DGMConfig.inactive` of all.

    Raises:
        ValueError: if a unit does not fit a layer.

    """
    weights = []
    for candidate in candidates:
        if not candidate.masked:
            continue
        try:
            inactive = config.inactive if treatment is None else treatment(candidate)
            weights.append(_masked_weight(candidate, config, state, wait, inactive))
        except ValueError:
            if not candidate.seems_head:
                raise
    return weights


def _masked_weight(
    candidate: Candidate, config: DGMConfig, state: Mapping[str, Any] | None, wait: bool, inactive: Treatment
) -> MaskedWeight:
    size = config.units.size
    block_size, note = unit_of(candidate, size)
    if isinstance(size, str):
        saved = state["layers"].get(candidate.name) if state else None
        if saved and tuple(saved["shape"]) == candidate.shape:
            before, where = saved["block_size"], "as in the checkpoint"
        else:
            before, where = unit_of_zeros(candidate) if state is None else None, "as its zeros lie"
        if before and before != block_size:
            what = "single weights" if before == 1 else f"units of {size_words(before)}"
            block_size, note = before, f"{what} {where}"
    return MaskedWeight(candidate, block_size, unit_note(candidate, note), inactive, waits=wait)


def unit_note(candidate: Candidate, note: str) -> str:
    """Return a remark on a layer's unit, with the matrices that the layer stacks before it."""
    if candidate.parts == 1:
        return note
    parts, experts = f"{candidate.parts} fused matrices", candidate.kind.experts
    what = parts if not experts else f"{experts} experts" + f" in {parts}" * (candidate.parts > experts)
    return "; ".join(filter(None, (f"{what}, each with its own budget", note)))


def unit_of_zeros(candidate: Candidate) -> BlockSize | None:
    """Return the coarsest unit that all zeros of a weight fill, as an earlier mask leaves them; None without zeros.

    A weight that is sharded or without storage, or all zero, or has next to no zeros, tells of no mask.
    """
    if candidate.shard.groups or candidate.weight.is_meta:
        return None
    weight = candidate.shard.local(candidate.weight).detach()
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    if not _FEWEST_ZEROS * weight.numel() <= zeros < weight.numel():
        return None
    for size in reversed(fitting_units(UNIT_SIZES, candidate.part_shape)):
        if int((pool_norm(weight, size) == 0).sum()) * unit_size(weight.shape, size) == zeros:
            return size
    return 1


@torch.no_grad()
def draw_masks(
    weights: Sequence[MaskedWeight],
    budgets: Sequence[Sequence[int]],
    config: DGMConfig,
    *,
    largest: bool = False,
    arrive: Callable[[MaskedWeight], None] = lambda weight: None,
    drawn: Callable[[MaskedWeight, float], None] = lambda weight, scale: None,
) -> list[int]:
    """Draw masks by `_masks.initial_mask` and bring the weights in line with them.

    Initial weights are scaled by ``density**-0.5`` if the settings ask for it, but not with `largest`, and not where an
    earlier mask has left zeros: such weights have been scaled already.

    Args:
        weights: masked weights of the model.
        budgets: number of active units of each part of each weight.
        config: settings; seed, pattern and scaling are used.
        largest: whether the largest units are chosen, to recover masks from weights.
        arrive: called with each weight before it is read.
        drawn: called with each weight once it is in line with its mask, and the factor by which it was scaled.

    Returns:
        Number of units of each weight that were not zero before.

    Raises:
        ValueError: if a pattern does not fit a layer.

    """
    generator = torch.Generator().manual_seed(config.seed)
    scaled = config.step_size.scale_initial_weights and not largest
    held = []
    for weight, budget in zip(weights, budgets, strict=True):
        arrive(weight)
        norms = weight.placement.unit_norms(weight.weight)
        take_largest = largest or weight.inactive.learn
        with weight.naming_errors():
            parts = [
                _initial(config.update_rule.pattern, part, k, generator, largest=take_largest)
                for part, k in zip(norms.chunk(len(budget)), budget, strict=True)
            ]
        weight.set_mask(torch.cat(parts))
        held.append(active_units(norms > 0))
        weight.inactive.apply_mask_(weight)
        scale = 1.0
        if scaled and not weight.inactive.act_in_forward and held[-1] > weight.active:
            scale = weight.density**-0.5
            weight.weight.mul_(scale)
        drawn(weight, scale)
    return held


def _initial(pattern: Pattern | None, norms: Tensor, k: int, generator: torch.Generator, *, largest: bool) -> Tensor:
    if pattern is None:
        return initial_mask(norms, k, generator, largest=largest)
    noise = torch.rand(norms.shape, generator=generator, device="cpu")
    return draw(pattern, torch.where(norms > 0, norms if largest else noise, noise - 1.0), k)


@torch.no_grad()
def keep_zeros(weights: Sequence[MaskedWeight], budgets: Sequence[Sequence[int]]) -> list[MaskedWeight]:
    """Mask the units that are zero, where an earlier mask has left them; the weights stay as they are.

    Args:
        weights: weights whose first masks are still to be drawn.
        budgets: number of units that these will have; weights with more that are not zero hold no earlier mask.

    Returns:
        The weights with such zeros.

    """
    found = []
    for weight, budget in zip(weights, budgets, strict=True):
        alive = weight.placement.unit_norms(weight.weight) > 0
        if 0 < active_units(alive) <= sum(budget) < weight.units:
            weight.set_mask(alive)
            found.append(weight)
    return found


def describe_zeros(kept: Sequence[MaskedWeight], total: int) -> str:
    """Return a sentence on the weights with an earlier mask's zeros, of so many in all; empty if there are none."""
    names = [weight.name for weight in kept]
    return _describe(
        total, (names, "hold zeros as an earlier mask leaves them: what is not zero stays active, unscaled")
    )


def describe_recovered(weights: Sequence[MaskedWeight], held: Sequence[int]) -> str:
    """Return a sentence that compares masks recovered from weights with the zeros that were found there."""
    if not weights:
        return "no layer holds zeros: the largest units stay active, once the next step has shown which layers train"
    pairs = list(zip(weights, held, strict=True))
    exact = [weight.name for weight, n in pairs if n == weight.active]
    fewer = [weight.name for weight, n in pairs if n < weight.active]
    more = [weight.name for weight, n in pairs if n > weight.active]
    rest = weights[0].inactive.when_dropped
    return _describe(
        len(weights),
        (exact, "hold as many zeros as the schedule leaves: their masks are what they were"),
        (fewer, "hold more zeros than the schedule leaves: some of these units are active again, drawn at random"),
        (more, f"hold fewer zeros than the schedule leaves: the largest units stay active, the rest is {rest}"),
    )


def _describe(total: int, *cases: tuple[list[str], str]) -> str:
    return "; ".join(
        f"{len(names)} of {total} masked layers ({first_names(names)}) {what}" for names, what in cases if names
    )
