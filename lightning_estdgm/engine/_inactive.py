"""Treatment of the inactive weights of one layer: a class for each mode of `DGMConfig.inactive`.

`ZeroWeights` sets them to zero, `FrozenWeights` keeps their values, and `LearningWeights` trains them outside the
forward (Top-KAST, SR-STE). Other modules ask a mode for its attributes, never which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_estdgm.method._backward_set import BackwardSet, ShadowWeights
from lightning_estdgm.method._masks import masked_select_units

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight

_KEY = "held_back"  # key in a layer's state if inactive weights learn


class InactiveWeights(ABC):
    """Treatment of the inactive weights of one layer, around an optimizer's steps and around mask updates.

    The methods that are not abstract do what most modes do, which mostly is nothing.

    Attributes:
        act_in_forward: whether inactive weights take part in the forward.
        learn: whether they go on learning: then masks are chosen among all weights, nothing is dropped, optimizer
            state is kept, every step's backward has to yield the whole gradient, and a step's closure is wrapped.
        stored: whether the parameter, and so its gradient, holds inactive weights.
        when_dropped: fate of a weight that is dropped, in words.

    """

    stored = True
    act_in_forward = False
    learn = False
    when_dropped = "set to zero"

    def learning_density(self, weight: MaskedWeight) -> float:
        """Return the share of the weights whose gradient is needed in every step."""
        return weight.density

    def mask_gradient_(self, weight: MaskedWeight, gradient: Tensor) -> None:
        """Zero the gradient of units that do not learn, in place."""
        weight.fill_inactive_(gradient)

    # ---- around a step

    def step_scale(self, weight: MaskedWeight, exponent: float) -> float:
        """Return the factor on the learning rate of the weight; `exponent` is `StepSize.exponent`."""
        return weight.density**-exponent

    def before_step(self, weight: MaskedWeight) -> None:  # noqa: B027
        """Prepare an optimizer's step, before its closure runs."""

    def with_gradients(self, weight: MaskedWeight, grad_scale: float | Tensor) -> None:  # noqa: B027
        """Prepare a step once its gradients are there; they are `grad_scale` times too large."""

    @abstractmethod
    def after_step(self, weight: MaskedWeight) -> None:
        """Bring the weight in line with its mask after a step."""

    def withdraw(self, weight: MaskedWeight) -> None:  # noqa: B027
        """Undo `with_gradients` where no step was made, or before a closure's forward."""

    def forget(self) -> None:  # noqa: B027
        """Free what is kept from step to step."""

    # ---- around a mask update

    def before_update(self, weight: MaskedWeight) -> None:  # noqa: B027
        """Prepare a mask update: make the weight hold all values that the update chooses among."""

    @abstractmethod
    def apply_mask_(self, weight: MaskedWeight) -> None:
        """Bring the weight in line with a mask that was just drawn or updated."""

    def mask_copy_(self, weight: MaskedWeight, local: Tensor) -> None:
        """Zero the inactive part of a copy of the weight, given as the layer stores it whole, ``(out, in, ...)``."""
        weight.fill_inactive_(local)

    def store_copy_(self, weight: MaskedWeight, module: Any) -> None:  # noqa: B027
        """Have a copy of the layer store its weight as the layer does."""

    def arrange(self, weight: MaskedWeight) -> None:  # noqa: B027
        """Lay the stored units out by their age, after cohorts of young ones have changed."""

    def follow_loaded_mask_(self, weight: MaskedWeight, before: Tensor) -> None:  # noqa: B027
        """Bring the stored units in line with a mask that was loaded; weights are loaded by their owner.

        Args:
            weight: weight, with that mask.
            before: its mask before.

        """

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the entries that this mode adds to the layer's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], name: str) -> None:
        """Load the entries that `state_dict` returned.

        Args:
            state: state of the layer.
            name: name of the layer, for errors.

        Raises:
            ValueError: if the state is that of another mode.

        """
        if self.learn != (_KEY in state):
            found = "none" if self.learn else "some"
            raise ValueError(
                f"layer {name!r}: the checkpoint holds {found} of the weights that a backward set trains. Pass the "
                "inactive= of its run to go on; to train on under this run's, load the weights and begin a run without "
                "ckpt_path="
            )


class ZeroWeights(InactiveWeights):
    """Inactive weights are zero."""

    def after_step(self, weight: MaskedWeight) -> None:
        """Zero inactive weights again, which momentum and weight decay have moved."""
        weight.fill_inactive_(weight.weight)

    def apply_mask_(self, weight: MaskedWeight) -> None:
        """Zero the inactive weights."""
        weight.fill_inactive_(weight.weight)


class FrozenWeights(InactiveWeights):
    """Inactive weights keep their values and take part in the forward."""

    act_in_forward = True
    when_dropped = "kept as it is, without updates"

    def __init__(self) -> None:
        self._before: Tensor | None = None  # the weight before a step; the buffer is kept for the next

    def step_scale(self, weight: MaskedWeight, exponent: float) -> float:
        """Return 1: the forward is dense."""
        return 1.0

    def before_step(self, weight: MaskedWeight) -> None:
        """Copy the weight, to give inactive units their values back: momentum and weight decay move them."""
        if weight.is_dense:
            self._before = None
        elif self._before is None:
            self._before = weight.weight.clone()
        else:
            self._before.copy_(weight.weight)

    def after_step(self, weight: MaskedWeight) -> None:
        """Give inactive weights their values back."""
        if self._before is not None:
            active, grain = weight.addressed_mask, weight.placement.grain
            weight.weight.copy_(masked_select_units(active, weight.weight, self._before, grain))

    def forget(self) -> None:
        """Free the copy."""
        self._before = None

    def apply_mask_(self, weight: MaskedWeight) -> None:
        """Do nothing: weights keep their values."""


class LearningWeights(InactiveWeights):
    """Inactive weights are zero in the forward and go on learning in the shadow, by the gradient of the sparse network.

    For a step of the optimizer they are added to the weight, and taken out again after it.

    Args:
        backward_set: settings of the backward set.
        weight: weight that they belong to, with its first mask; not a sharded one.

    """

    learn = True

    def __init__(self, backward_set: BackwardSet, weight: MaskedWeight) -> None:
        self.shadow = ShadowWeights(backward_set, weight.weight, weight.mask, weight.block_size)

    def learning_density(self, weight: MaskedWeight) -> float:
        """Return the density of the backward set."""
        return self.shadow.density

    def mask_gradient_(self, weight: MaskedWeight, gradient: Tensor) -> None:
        """Zero the gradient outside the backward set."""
        self.shadow.mask_gradient_(gradient)

    def with_gradients(self, weight: MaskedWeight, grad_scale: float | Tensor) -> None:
        """Add inactive weights and the penalty's gradient."""
        gradient = weight.gradient
        if gradient is not None:
            self.shadow.put_in_(weight.weight)
            self.shadow.penalize_(gradient, weight.weight, weight.mask, grad_scale)

    def after_step(self, weight: MaskedWeight) -> None:
        """Take inactive weights out again."""
        self.withdraw(weight)

    def withdraw(self, weight: MaskedWeight) -> None:
        """Take inactive weights out, as they are now."""
        self.shadow.take_out(weight.weight, weight.mask)
        weight.fill_inactive_(weight.weight)

    def before_update(self, weight: MaskedWeight) -> None:
        """Add inactive weights: masks are chosen among all weights."""
        self.shadow.put_in_(weight.weight)

    def apply_mask_(self, weight: MaskedWeight) -> None:
        """Take out the weights that the mask makes inactive, and choose the backward set."""
        self.shadow.take_all(weight.weight, weight.mask)
        weight.fill_inactive_(weight.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the inactive weights and the backward set."""
        return {_KEY: self.shadow.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], name: str) -> None:
        """Load the inactive weights and the backward set."""
        super().load_state_dict(state, name)
        self.shadow.load_state_dict(state[_KEY])


_MODES: dict[str, type[InactiveWeights]] = {"zero": ZeroWeights, "frozen": FrozenWeights}


Treatment = Literal["zero", "frozen"] | BackwardSet | Callable[["MaskedWeight"], InactiveWeights]
"""A value of `DGMConfig.inactive`, or what makes the treatment of a weight that is stored in another way."""


def inactive_weights(setting: Treatment, weight: MaskedWeight) -> InactiveWeights:
    """Return the treatment of a weight's inactive part."""
    if isinstance(setting, BackwardSet):
        return LearningWeights(setting, weight)
    return _MODES[setting]() if isinstance(setting, str) else setting(weight)
