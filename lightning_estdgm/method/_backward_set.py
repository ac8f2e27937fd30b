"""Backward set of Top-KAST and SR-STE: inactive weights that learn outside the forward, and their settings.

The parameter holds the active weights and zeros elsewhere; the inactive ones are kept in the `ShadowWeights` of their
layer. They are added to the parameter for the optimizer's step and taken out after it, so any optimizer trains them.
When that happens is not decided here but by `engine._inactive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm._checks import check_number, check_share
from lightning_estdgm.method._masks import (
    BlockSize,
    active_units,
    masked_select_units,
    pack_bits,
    pool_norm,
    top_k,
    unpack_bits,
)


@dataclass(frozen=True)
class BackwardSet:
    r"""Settings of the backward set: its density, and the penalties on its weights.

    With the active weights A and the learning weights B, a superset of A, the gradient that the optimizer sees is
    :math:`\nabla_i + c_i w_i`, where :math:`c_i` is `active_decay` on A and `shadow_decay` on the rest of B. Weights
    outside B rest: they keep their value. At a mask update the B of each layer become its largest weights.

    Attributes:
        density: share of each layer's weights that learn, in (0, 1]; the active ones always do.
        active_decay: penalty on active weights, at least 0.
        shadow_decay: penalty on inactive weights that learn, at least 0.

    """

    density: float = 1.0
    active_decay: float = 0.0
    shadow_decay: float = 0.0

    def __post_init__(self) -> None:
        check_share("inactive.density", self.density)
        for name in ("active_decay", "shadow_decay"):
            check_number(f"inactive.{name}", getattr(self, name), at_least=0)


class ShadowWeights:
    """Inactive weights of one layer, and which of its units learn. Not for sharded weights.

    Args:
        backward_set: settings.
        weight: the layer's weight, ``(out, in, ...)``.
        mask: its mask over units.
        block_size: side of a unit.

    Attributes:
        weights: inactive weights, of the weight's shape; 0 at active units.
        learning: bool of the mask's shape, true for units of the backward set.

    """

    def __init__(self, backward_set: BackwardSet, weight: Tensor, mask: Tensor, block_size: BlockSize) -> None:
        self._backward_set = backward_set
        self._block_size = block_size
        self.weights = torch.zeros_like(weight)
        self.learning = torch.ones_like(mask)
        self._is_out = False

    @property
    def density(self) -> float:
        """Share of the units that learn."""
        return active_units(self.learning) / self.learning.numel()

    def take_all(self, weight: Tensor, mask: Tensor) -> None:
        """Copy the inactive weights out of `weight`, and choose the backward set: its largest units."""
        count = max(round(self._backward_set.density * mask.numel()), active_units(mask))
        self.learning = top_k(pool_norm(weight, self._block_size).masked_fill(mask, torch.inf), count)
        self.weights = self._where(mask, torch.zeros_like(weight), weight)
        self._is_out = False

    def put_in_(self, weight: Tensor) -> None:
        """Add the inactive weights to `weight`, which is zero there; does nothing if they are in already."""
        if not self._is_out:
            weight.add_(self.weights)
            self._is_out = True

    def take_out(self, weight: Tensor, mask: Tensor) -> None:
        """Take the inactive weights over from `weight`: learning ones as they are now, resting ones as they were."""
        if self._is_out:
            stepped = self._where(self.learning, weight, self.weights)
            self.weights = self._where(mask, torch.zeros_like(weight), stepped)
            self._is_out = False

    def mask_gradient_(self, gradient: Tensor) -> None:
        """Zero the gradient outside the backward set."""
        gradient.copy_(self._where(self.learning, gradient, torch.zeros_like(gradient)))

    def penalize_(self, gradient: Tensor, weight: Tensor, mask: Tensor, scale: float | Tensor) -> None:
        """Add `scale` times the penalties' gradient; call it while the inactive weights are in `weight`."""
        active, shadow = self._backward_set.active_decay, self._backward_set.shadow_decay
        if active or shadow:
            penalty = self._where(mask, active * weight, shadow * weight)
            gradient.add_(self._where(self.learning, penalty, torch.zeros_like(penalty)).mul_(scale))

    def _where(self, mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return masked_select_units(mask, yes, no, self._block_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the inactive weights and the backward set."""
        return {"weights": self.weights.clone(), "learning": pack_bits(self.learning)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the inactive weights and the backward set."""
        self.weights.copy_(state["weights"])
        self.learning = unpack_bits(state["learning"], tuple(self.learning.shape)).to(self.learning.device)
