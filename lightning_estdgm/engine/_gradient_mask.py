"""Masking of gradients in place, once: a masked gradient is masked again only if something has written to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight


class MaskedGradient:
    """Identity and version of the gradient of one weight that was masked last.

    The version is torch's count of writes to a tensor and to other views of its memory.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int, int] | None = None

    def forget(self) -> None:
        """Forget the gradient: the next backward may write to it without torch counting that, as DDP does."""
        self._seen = None

    def remember(self, weight: MaskedWeight) -> None:
        """Remember the weight's current gradient as masked."""
        self._seen = _versions(weight)

    def is_current(self, weight: MaskedWeight) -> bool:
        """Whether the weight's gradient is the remembered one and was not written to since."""
        then, now = self._seen, _versions(weight)
        return then is not None and now is not None and then[0]() is now[0]() and then[1:] == now[1:]


def mask_gradients_(weights: Sequence[MaskedWeight], *, if_touched: bool = False) -> None:
    """Zero the gradients of units that do not learn, in place.

    Args:
        weights: weights whose gradients are masked; those without a gradient are left out.
        if_touched: whether gradients that nothing has written to since they were masked are left out.

    """
    weights = [weight for weight in weights if weight.inactive.stored]
    for weight in weights:
        gradient = weight.gradient
        if gradient is not None and not (if_touched and weight.masked_gradient.is_current(weight)):
            weight.inactive.mask_gradient_(weight, gradient)
    for weight in weights:  # not before: gradients may be views of one buffer
        weight.masked_gradient.remember(weight)


def _versions(weight: MaskedWeight) -> tuple[Any, int, int] | None:
    """Return the gradient's identity and versions of it and its local part; None without, or if torch counts none."""
    whole, gradient = weight.parameter.grad, weight.gradient
    if whole is None or gradient is None or whole.is_inference():  # such tensors count no writes
        return None
    return TensorWeakRef(whole), whole._version, gradient._version
