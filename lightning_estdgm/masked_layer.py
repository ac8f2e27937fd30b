"""One masked weight: its mask, what is observed of its gradient, and what a step and an update do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_estdgm import scores
from lightning_estdgm.layers import Candidate
from lightning_estdgm.masks import (
    active_units,
    decide,
    fill_inactive_,
    mask_shape,
    masked_select_units,
    pack_bits,
    pool_norm,
    unit_size,
    unpack_bits,
)

__all__ = ["MaskedLayer"]


class _Window:
    """Sums over the observed gradients of one layer; exists only inside an observation window."""

    def __init__(self, weight: Tensor, block_size: int) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.gradient = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.norm = torch.zeros(mask_shape(weight.shape, block_size), dtype=dtype, device=weight.device)
        self.samples = 0


class MaskedLayer:
    """The state of one masked weight. Tensors are oriented ``(out, in, ...)``, however the weight is stored.

    Attributes:
        mask: bool over units, true where active; replaced as a whole by `set_mask`.
        active: number of active units.
        units: number of all units.
        unit_size: weights in a unit.
        explored: bool over units, true where ever active.
        backend: what computes the layer now.
        final_backend: what will at the final density; ``"?"`` until measured.
        why: the reason for that, in words.

    """

    def __init__(self, candidate: Candidate, block_size: int, note: str) -> None:
        self.candidate = candidate
        self.block_size = block_size
        self.note = note
        shape = self.weight.shape
        self.units = math.prod(mask_shape(shape, block_size))
        self.unit_size = unit_size(shape, block_size)
        self.mask = torch.ones(mask_shape(shape, block_size), dtype=torch.bool, device=self.weight.device)
        self.explored = torch.zeros_like(self.mask)
        self.active = self.units
        self.backend = "dense"
        self.final_backend = "?"
        self.why = ""
        self._inactive = ~self.mask
        self._window: _Window | None = None
        self._sampled = False
        self._snapshot: Tensor | None = None

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.candidate.name

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as stored."""
        return self.candidate.weight

    @property
    def weight(self) -> Tensor:
        """The weight, sharing storage with the parameter."""
        return self.candidate.oriented(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The weight's gradient, sharing storage with the parameter's; ``None`` without one."""
        grad = self.parameter.grad
        return None if grad is None else self.candidate.oriented(grad.detach())

    @property
    def density(self) -> float:
        """Active share of the weights."""
        return self.active / self.units

    @property
    def is_dense(self) -> bool:
        """Whether every unit is active."""
        return self.active == self.units

    def set_mask(self, mask: Tensor) -> None:
        """Take `mask` over; weights are left alone."""
        self.mask = mask.to(self.weight.device)
        self._inactive = ~self.mask
        self.active = active_units(self.mask)
        self.explored |= self.mask

    def fill_inactive_(self, tensor: Tensor) -> None:
        """Zero a tensor of the weight's shape where the mask is inactive."""
        if not self.is_dense:
            fill_inactive_(tensor, self._inactive, self.block_size)

    # ------------------------------------------------------------------ the optimizer's step

    def snapshot_weight(self) -> None:
        """Remember the weight as it is before a step."""
        if self._snapshot is None:
            self._snapshot = self.weight.clone()
        else:
            self._snapshot.copy_(self.weight)

    def forget_snapshot(self) -> None:
        """Free the memory of the last snapshot."""
        self._snapshot = None

    def scale_step_(self, scale: float) -> None:
        """Make the step since the snapshot `scale` times as large."""
        if self._snapshot is not None and scale != 1.0:
            self.weight.lerp_(self._snapshot, 1.0 - scale)

    def undo_inactive_(self) -> None:
        """Give inactive weights the value they had at the snapshot."""
        if self._snapshot is not None:
            self.weight.copy_(masked_select_units(self.mask, self.weight, self._snapshot, self.block_size))

    # ------------------------------------------------------------------ observation

    @property
    def observed(self) -> bool:
        """Whether the window holds anything to decide by."""
        return self._window is not None and self._window.samples > 0

    def begin_step(self) -> None:
        """Allow the next `observe` of this layer."""
        self._sampled = False

    @staticmethod
    def observe(layers: Sequence[MaskedLayer], scale: float) -> bool:
        """Add the gradients of `layers` to their windows, unless one of them is not finite; once a step.

        Args:
            layers: those whose gradients belong to one step.
            scale: factor on the gradients.

        Returns:
            Whether the gradients were finite.

        """
        seen = [(layer, layer.gradient) for layer in layers if not layer._sampled]
        norms = [(layer, g, pool_norm(g, layer.block_size)) for layer, g in seen if g is not None]
        for layer, _, _ in norms:
            layer._sampled = True
        if norms and not torch.stack([norm.sum() for _, _, norm in norms]).isfinite().all():
            return False
        for layer, gradient, norm in norms:
            if layer._window is None:
                layer._window = _Window(layer.weight, layer.block_size)
            layer._window.gradient.add_(gradient, alpha=scale)
            layer._window.norm.add_(norm, alpha=scale)
            layer._window.samples += 1
        return True

    # ------------------------------------------------------------------ mask update

    def redecide(self, budget: Sequence[int], drop_fraction: float, gamma: float) -> tuple[Tensor, int]:
        """Replace the mask by one decided from the weight and the window; end the window.

        Args:
            budget: active units of each part of the layer.
            drop_fraction: see `masks.decide`.
            gamma: see `scores.growth`.

        Returns:
            The units whose state changed, and how many of them were grown.

        """
        window, self._window = self._window, None
        if window is None:  # the layer took part in no observed step: nothing to grow by, so nothing is dropped for it
            growth, drop_fraction = torch.zeros(self.mask.shape, device=self.mask.device), 0.0
        else:
            mean_gradient_norm = pool_norm(window.gradient, self.block_size) / window.samples
            growth = scores.growth(mean_gradient_norm, window.norm / window.samples, gamma)
        old, weight_scores = self.mask, scores.magnitude(self.weight, self.block_size)
        if weight_scores.isnan().any():
            raise ValueError(f"the run has diverged: layer {self.name!r} holds NaN weights at a mask update")
        olds, weights, growths = (x.chunk(len(budget)) for x in (old, weight_scores, growth))
        parts = zip(olds, weights, growths, budget, strict=True)
        self.set_mask(torch.cat([decide(m, w, g, k, drop_fraction) for m, w, g, k in parts]))
        return old ^ self.mask, active_units(self.mask & ~old)

    def clear_optimizer_state_(self, optimizer: Optimizer, units: Tensor) -> None:
        """Zero every state tensor of the weight's shape at `units`; step counts and the like stay."""
        for value in optimizer.state.get(self.parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == self.parameter.shape:
                fill_inactive_(self.candidate.oriented(value), units, self.block_size)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return mask, window and backend in plain types."""
        window = self._window
        return {
            "shape": list(self.weight.shape),
            "block_size": self.block_size,
            "mask": pack_bits(self.mask),
            "explored": pack_bits(self.explored),
            "backend": self.backend,
            "final_backend": self.final_backend,
            "why": self.why,
            "window": window
            and {"gradient": window.gradient.clone(), "norm": window.norm.clone(), "samples": window.samples},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned for a layer of the same shape and block size."""
        shape = tuple(self.mask.shape)
        self.set_mask(unpack_bits(state["mask"], shape))
        self.explored = unpack_bits(state["explored"], shape).to(self.mask.device)
        self.backend, self.final_backend, self.why = state["backend"], state["final_backend"], state["why"]
        self._window = None
        if state["window"]:
            self._window = _Window(self.weight, self.block_size)
            self._window.gradient.copy_(state["window"]["gradient"])
            self._window.norm.copy_(state["window"]["norm"])
            self._window.samples = state["window"]["samples"]
