"""Weights that are out of the forward and go on learning: two levels of mask, as Top-KAST and SR-STE have them.

The parameter holds the active weights and zeros elsewhere, as always; the others wait in the `ShadowWeights` of their
layer. For the optimizer's step they are put in their places, and taken out after it, so any optimizer serves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm._checks import check_number
from lightning_estdgm.method._masks import masked_select_units, pack_bits, pool_norm, top_k, unpack_bits


@dataclass(frozen=True)
class BackwardSet:
    r"""Which inactive weights learn, and the penalty that holds them down.

    With active weights A and learning ones B, a superset, the gradient that the optimizer sees is
    :math:`\nabla_i + c_i w_i`, where :math:`c_i` is `active_decay` on A and `shadow_decay` on the rest of B. Weights
    outside B rest: they keep their value. At a mask update each layer's B are its largest weights.

    Attributes:
        density: share of each layer's weights that learn, in (0, 1]; at least the active ones do.
        active_decay: penalty of active weights, at least 0.
        shadow_decay: penalty of learning weights that are not active, at least 0.

    """

    density: float = 1.0
    active_decay: float = 0.0
    shadow_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")
        for name in ("active_decay", "shadow_decay"):
            check_number(name, getattr(self, name), at_least=0)


class ShadowWeights:
    """The inactive weights of one layer. Whole weights only; tensors have the weight's shape, masks the units'.

    Attributes:
        weights: the inactive weights; 0 where active.
        learning: bool over units, true where the gradient counts.

    """

    def __init__(self, backward_set: BackwardSet, weight: Tensor, mask: Tensor, block_size: int) -> None:
        self._backward_set = backward_set
        self._block_size = block_size
        self.weights = torch.zeros_like(weight)
        self.learning = torch.ones_like(mask)
        self._is_out = False

    @property
    def density(self) -> float:
        """Share of the units that learn."""
        return int(torch.count_nonzero(self.learning)) / self.learning.numel()

    def take_all(self, weight: Tensor, mask: Tensor) -> None:
        """Take the inactive weights of a whole `weight`, and choose which of them learn."""
        count = max(round(self._backward_set.density * mask.numel()), int(torch.count_nonzero(mask)))
        self.learning = top_k(pool_norm(weight, self._block_size).masked_fill(mask, torch.inf), count)
        self.weights = self._where(mask, torch.zeros_like(weight), weight)
        self._is_out = False

    def put_in_(self, weight: Tensor) -> None:
        """Put the inactive weights in their places, where there are zeros; once until they are taken out."""
        if not self._is_out:
            weight.add_(self.weights)
            self._is_out = True

    def take_out(self, weight: Tensor, mask: Tensor) -> None:
        """Take back what was put in: learning weights as they are now, resting ones as they were."""
        if self._is_out:
            stepped = self._where(self.learning, weight, self.weights)
            self.weights = self._where(mask, torch.zeros_like(weight), stepped)
            self._is_out = False

    def mask_gradient_(self, gradient: Tensor) -> None:
        """Zero the gradient of resting weights."""
        gradient.copy_(self._where(self.learning, gradient, torch.zeros_like(gradient)))

    def penalize_(self, gradient: Tensor, weight: Tensor, mask: Tensor, scale: float | Tensor) -> None:
        """Add the penalty's gradient, `scale` times, while the inactive weights are in their places."""
        active, shadow = self._backward_set.active_decay, self._backward_set.shadow_decay
        if active or shadow:
            penalty = self._where(mask, active * weight, shadow * weight)
            gradient.add_(self._where(self.learning, penalty, torch.zeros_like(penalty)).mul_(scale))

    def _where(self, mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return masked_select_units(mask, yes, no, self._block_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and which of them learn."""
        return {"weights": self.weights.clone(), "learning": pack_bits(self.learning)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.weights.copy_(state["weights"])
        self.learning = unpack_bits(state["learning"], tuple(self.learning.shape)).to(self.learning.device)
