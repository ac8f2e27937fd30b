"""Masking of gradients, skipping those that nothing has written to since they were masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight


class MaskedGradient:
    """Memory of which gradient of one weight was masked last, and in which state.

    Torch counts the writes to a tensor, together with those to other views of its memory.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int, int] | None = None

    def forget(self) -> None:
        """Take no gradient for masked: the next backward may write to it where torch does not see it (DDP does)."""
        self._seen = None

    def remember(self, weight: MaskedWeight) -> None:
        """Note the weight's gradient as masked, as it is now."""
        self._seen = _versions(weight)

    def is_current(self, weight: MaskedWeight) -> bool:
        """Whether the gradient is the one that was masked, and not written to since."""
        then, now = self._seen, _versions(weight)
        return then is not None and now is not None and then[0]() is now[0]() and then[1:] == now[1:]


def mask_gradients_(weights: Sequence[MaskedWeight], *, if_touched: bool = False) -> None:
    """Zero the gradients of units that do not learn, in place.

    Args:
        weights: those whose gradients to mask; without a gradient a weight is left out.
        if_touched: leave out gradients that nothing wrote to since they were masked.

    """
    for weight in weights:
        gradient = weight.gradient
        if gradient is not None and not (if_touched and weight.masked_gradient.is_current(weight)):
            weight.inactive.mask_gradient_(weight, gradient)
    for weight in weights:  # not before: gradients may be views of one buffer
        weight.masked_gradient.remember(weight)


def _versions(weight: MaskedWeight) -> tuple[Any, int, int] | None:
    """Return what tells later whether the gradient is the same tensor, not written to; None where nothing does."""
    whole, gradient = weight.parameter.grad, weight.gradient
    if whole is None or gradient is None or whole.is_inference():  # such tensors count no writes
        return None
    return TensorWeakRef(whole), whole._version, gradient._version
