"""Observation windows: sums over the gradients of the steps before a mask update. Scores of them are in `method`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import agree, all_reduce

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight
    from lightning_estdgm.engine._placement import Placement


class Window:
    """Sums over the observed gradients of one weight; exists only inside an observation window.

    Args:
        weight: local part of the weight.
        mask: mask in this rank's form.

    Attributes:
        gradient: sum of the gradients, of the weight's shape, at least float32.
        norm: sum of the norms of the gradients' units, of the mask's shape.
        samples: number of gradients in the sums.

    """

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.gradient = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.norm = torch.zeros(mask.shape, dtype=dtype, device=weight.device)
        self.samples = 0

    def add(self, gradient: Tensor | None, norm: Tensor, scale: float) -> None:
        """Add `scale` times a gradient (``None``: this rank holds no part of it) and the norms of its units."""
        if gradient is not None:
            self.gradient.add_(gradient, alpha=scale)
        self.norm.add_(norm, alpha=scale)
        self.samples += 1

    def state_dict(self, placement: Placement) -> dict[str, Any]:
        """Return whole copies of the sums; if the weight is sharded, call it on every rank: rank 0 gets the copies."""
        tensors = {"gradient": self.gradient, "norm": self.norm}
        return {"samples": self.samples} | {name: placement.saved(name, x) for name, x in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any], weight: MaskedWeight) -> None:
        """Load the state that `state_dict` returned on rank 0.

        Raises:
            ValueError: if the state is another rank's, which holds no sums.

        """
        if state["gradient"] is None:
            raise ValueError(
                f"layer {weight.name!r}: the state of an open observation window is whole on rank 0 only: "
                "expected the state that rank 0 saved"
            )
        self.gradient.copy_(weight.shard.part(state["gradient"]))
        self.norm.copy_(weight.placement.to_local(state["norm"]))
        self.samples = state["samples"]


def observe(weights: Sequence[MaskedWeight], scale: float) -> bool:
    """Add the gradients of `weights` to their windows, once a step, and only if all of them are finite.

    If weights are sharded, all ranks must call it: one all-reduce gives them the norms of units that lie on several
    ranks, the weights that have a gradient on any rank, and whether all gradients are finite.

    Args:
        weights: weights whose gradients belong to one step.
        scale: factor on the gradients.

    Returns:
        Whether the gradients were finite.

    """
    waiting = {w: w.placement.whole_gradient(w.gradient) for w in weights if not w.sampled}
    messages: dict[MaskedWeight, Tensor] = {}
    for weight, gradient in waiting.items():
        message = weight.placement.observation(gradient, weight.mask)
        if message is not None:
            messages[weight] = message
    sums = dict(zip(messages, all_reduce([weight.shard for weight in messages], list(messages.values())), strict=True))
    norms = {
        weight: weight.placement.observed_norm(weight.weight, waiting[weight], summed)
        for weight, summed in _taking_part(sums)
    }
    totals = [weight.placement.total(summed) for weight, summed in sums.items()]
    for weight in norms:
        weight.sampled = True
    finite = not totals or bool(torch.stack([total.isfinite() for total in totals]).all())
    if len({tuple(map(id, weight.shard.groups)) for weight in waiting}) > 1:
        finite = not agree([weight.shard for weight in waiting], not finite)
    if not finite:
        return False
    for weight, norm in norms.items():
        if weight.window is None:
            weight.window = weight.placement.window(weight.weight, weight.mask)
        weight.window.add(waiting[weight], norm, scale)
    return True


def _taking_part(sums: Mapping[MaskedWeight, Tensor]) -> list[tuple[MaskedWeight, Tensor]]:
    """Return the weights with a gradient on any rank, and their sums; one transfer from the device for all."""
    if not sums:
        return []
    counts = torch.stack([weight.placement.took_part(summed) for weight, summed in sums.items()]).tolist()
    return [pair for pair, count in zip(sums.items(), counts, strict=True) if count]
