"""`StateRule`: what becomes of one entry of an optimizer's state where units of a weight are dropped or grown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.method._masks import keep_active_, masked_select_units

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight
    from lightning_estdgm.engine._unit_views import SteppedWeight


class StateRule(Protocol):
    """Reset of one entry of an optimizer's state to what the optimizer gives a fresh parameter."""

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Reset a state entry of a weight in place.

        Args:
            state: tensor with one element for each of the weight's.
            weight: weight that the state belongs to, with its new values.
            units: bool of the mask's shape, true where state is reset.

        """
        ...


@dataclass(frozen=True)
class Constant:
    """A fresh parameter has the same number everywhere: 0, an initial value, or the quantisation code of 0.

    The number is written in the dtype that the state has now, which ``load_state_dict`` may have changed.

    Attributes:
        value: the number.

    """

    value: float | int

    def __str__(self) -> str:
        return f"{self.value:.3g}"

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Write the number."""
        local = oriented(state, weight)
        if self.value == 0:
            keep_active_(local, weight.placement.address(~units), weight.placement.grain)
        else:
            _write_(local, torch.full_like(local, self.value), weight, units)


@dataclass(frozen=True)
class CopyOfWeight:
    """A fresh parameter has a copy of itself: a master copy, slow weights, an average."""

    def __str__(self) -> str:
        return "the weight"

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Copy the weight as it is now."""
        local = oriented(state, weight)
        _write_(local, weight.weight.to(local.dtype), weight, units)


@dataclass(frozen=True)
class Kept:
    """Nothing is reset, because no element of the entry belongs to one weight alone.

    Attributes:
        why: reason, in words.

    """

    why: str

    def __str__(self) -> str:
        return "kept"

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Requantised:
    """A tensor subclass whose inner tensors have no element of their own for each weight, such as packed 4-bit codes.

    Attributes:
        value: number that a fresh parameter has.

    """

    value: float

    def __str__(self) -> str:
        return f"{self.value:.3g}, requantised"

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Write the number into a dequantised copy, and copy that back."""
        dense = state.dequantize()
        Constant(self.value).reset_(dense, weight, units)
        state.copy_(dense)


@dataclass(frozen=True)
class Strided:
    """The entry has an element for every `stride`-th weight alone, as the copies of Prodigy with ``slice_p``.

    Attributes:
        rule: rule of a whole entry, by which these elements are reset.
        stride: distance of their weights in the flattened parameter.

    """

    rule: StateRule
    stride: int

    def __str__(self) -> str:
        return f"{self.rule}, for one in {self.stride}"

    def fits(self, state: Tensor, weight: MaskedWeight) -> bool:
        """Whether a state entry has an element for every `stride`-th weight that is here."""
        weights = local_tensor(weight.parameter).numel()
        return local_tensor(state).numel() == len(range(0, weights, self.stride))

    def reset_(self, state: Tensor, weight: MaskedWeight, units: Tensor) -> None:
        """Reset a whole entry that has these elements, and copy them back."""
        local = local_tensor(state).detach()
        whole = local.new_zeros(local_tensor(weight.parameter).shape)
        whole.view(-1)[:: self.stride] = local
        self.rule.reset_(whole, weight, units)
        local.copy_(whole.view(-1)[:: self.stride])


def copies_weight(rule: StateRule) -> bool:
    """Whether a fresh parameter has a copy of itself, or of every so many of its weights."""
    return isinstance(rule.rule if isinstance(rule, Strided) else rule, CopyOfWeight)


def oriented(state: Tensor, weight: SteppedWeight) -> Tensor:
    """Return the local part of a state entry, oriented ``(out, in, ...)``; it shares storage."""
    if weight.shard.holds(state):
        return weight.shard.local(state)
    like = weight.weight
    if state.shape == like.shape:
        return state.detach()
    transposed = like.dim() == 2 and not like.is_contiguous()
    return state.detach().view(like.t().shape).t() if transposed else state.detach().view(like.shape)


def _write_(local: Tensor, values: Tensor, weight: MaskedWeight, units: Tensor) -> None:
    kept = weight.placement.address(~units)
    local.copy_(masked_select_units(kept, local, values, weight.placement.grain))
