"""`MaskedWeight`: the state of one masked weight.

What acts on several weights at once is elsewhere: `_observation.observe`, `_gradient_mask.mask_gradients_`,
`_mask_update.update_masks`, `_masked_model.MaskedModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.engine._budget import LayerUnits
from lightning_estdgm.engine._gradient_mask import MaskedGradient
from lightning_estdgm.engine._inactive import Treatment, inactive_weights
from lightning_estdgm.engine._observation import Window
from lightning_estdgm.engine._placement import Placement, placement_of
from lightning_estdgm.engine._young_units import YoungUnits
from lightning_estdgm.method._masks import BlockSize, active_units, keep_active_, mask_shape, pack_bits, unpack_bits
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._kinds import is_computed
from lightning_estdgm.sparse.backends.native._memory import zero_outside_


class MaskedWeight:
    """State of one masked weight: its mask, observation window, inactive weights, backend.

    Tensors are this rank's part of the weight, oriented ``(out, in, ...)``: all of it if the weight is not sharded.

    Args:
        candidate: layer that the weight belongs to.
        block_size: side of a mask unit.
        note: remark on the unit, for users.
        inactive: value of `DGMConfig.inactive`, or what makes another treatment.
        waits: whether the weight stays dense until `take_in`.

    Attributes:
        candidate: layer that the weight belongs to.
        block_size: side of a mask unit; 1: single weights.
        note: remark on the unit, for users.
        shape: shape ``(out, in, ...)`` of the whole weight.
        sizes: number and size of the units, for budgets.
        shard: layout of the weight over ranks.
        placement: location of mask and norms over ranks.
        inactive: treatment of the inactive weights.
        mask: bool over units, true for active ones; replaced as a whole. The local part for single weights of a sharded
            weight, else whole.
        addressed_mask: the mask as it addresses local tensors, at `placement.grain`.
        active: number of active units of the whole weight.
        part_active: number of active units of each part.
        explored: bool over units, true for those that have ever been active.
        window: sums over observed gradients; ``None`` outside an observation window.
        sampled: whether the current step's gradient was observed.
        masked_gradient: identity of the gradient that was masked last.
        young: units that were grown not long ago.
        backend: name of the backend that computes the layer now.
        final_backend: name of the backend at the final density; ``"?"`` until measured.
        why: reason for the final backend, in words.
        since: number of steps done when it was first masked, if it began to train in mid-run; 0 otherwise.

    """

    def __init__(
        self,
        candidate: Candidate,
        block_size: BlockSize,
        note: str = "",
        inactive: Treatment = "zero",
        *,
        waits: bool = False,
    ) -> None:
        self.candidate = candidate
        self.shard = candidate.shard
        self.shape = candidate.shape
        self.backend = "dense"
        self.final_backend = "?"
        self.why = ""
        self.since = 0
        self.window: Window | None = None
        self.sampled = False
        self.masked_gradient = MaskedGradient()
        self.young = YoungUnits()
        self._written: tuple[int, int] | None = None
        self.use_unit(block_size, note)
        self._mode = inactive
        self.inactive = inactive_weights("zero" if waits else inactive, self)

    def use_unit(self, block_size: BlockSize, note: str) -> None:
        """Mask by units of another size from now on, all active; only before the weight is masked.

        Args:
            block_size: side of a mask unit.
            note: remark on the unit, for users.

        """
        self.block_size, self.note = block_size, note
        self.sizes = LayerUnits.of(self.candidate, block_size)
        self.placement: Placement = placement_of(self.candidate.shard, block_size)
        self.part_active = [self.units // self.candidate.parts] * self.candidate.parts
        mask = torch.ones(self.placement.mask_shape(self.weight), dtype=torch.bool, device=self.weight.device)
        self.set_local_mask(mask, self.units)
        self.explored = torch.zeros_like(self.mask)
        self._explored_units = 0

    def lay_out(self, shard: Shard, placement: Placement) -> None:
        """Store the weight in another way from now on."""
        self.shard, self.placement = shard, placement
        self.addressed_mask = placement.address(self.mask)

    # ------------------------------------------------------------------ the weight

    @property
    def name(self) -> str:
        """Name of the layer in the model."""
        return self.candidate.name

    @property
    def parameter(self) -> Tensor:
        """The weight as stored."""
        return self.candidate.weight

    @property
    def device(self) -> torch.device:
        """Device that the layer computes on."""
        return self.placement.device(self.weight)

    @property
    def weight(self) -> Tensor:
        """The local part of the weight, sharing storage with the parameter."""
        return self.shard.local(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """Local part of the gradient, sharing its storage; ``None`` without one, or until sharded as the weight is."""
        grad = self.parameter.grad
        return None if grad is None or not self.shard.holds(grad) else self.shard.local(grad)

    @property
    def has_gradient(self) -> bool:
        """Whether `gradient` is there."""
        grad = self.parameter.grad
        return grad is not None and self.shard.holds(grad)

    @property
    def has_operator(self) -> bool:
        """Whether a sparse operator can replace the forward, by its unit."""
        return self.has_operator_for(self.block_size)

    def has_operator_for(self, block_size: BlockSize) -> bool:
        """Whether a sparse operator can replace the forward, which needs a whole mask, for a mask unit."""
        is_local = block_size == 1 and self.placement.is_sharded
        return self.candidate.has_operator and not is_local and not self.placement.product

    # ------------------------------------------------------------------ the mask

    @property
    def units(self) -> int:
        """Number of all units of the whole weight."""
        return self.sizes.units

    @property
    def unit_size(self) -> int:
        """Number of weights in a unit."""
        return self.sizes.unit_size

    @property
    def density(self) -> float:
        """Active share of the weights."""
        return self.active / self.units

    @property
    def is_dense(self) -> bool:
        """Whether every unit is active."""
        return self.active == self.units

    @property
    def explored_units(self) -> int:
        """Number of units of the whole weight that have ever been active."""
        return self._explored_units if self.placement.mask_is_local else active_units(self.explored)

    @explored_units.setter
    def explored_units(self, count: int) -> None:
        self._explored_units = count

    def whole_mask(self) -> Tensor:
        """Return a copy of the whole mask on the CPU; if the weight is sharded, every rank has to call it."""
        return self.placement.to_whole(self.mask)

    def set_local_mask(self, mask: Tensor, active: int) -> None:
        """Replace this rank's mask by one with `active` units in the whole weight; weights stay as they are."""
        self.mask = mask.to(self.weight.device)
        self.addressed_mask = self.placement.address(self.mask)
        self.active = active
        self._inactive_place: tuple[int, ...] | None = None  # (): units lie by age; None: not sought yet
        self.masked_gradient.forget()

    def set_mask(self, mask: Tensor, explored: Tensor | None = None) -> None:
        """Replace the mask by a whole one, and `explored` (``None``: the mask itself); weights stay as they are."""
        explored = mask if explored is None else explored
        self.set_local_mask(self.placement.to_local(mask), active_units(mask))
        self.part_active = [active_units(part) for part in mask.chunk(self.candidate.parts)]
        self.explored = self.placement.to_local(explored).to(self.mask.device, copy=True)
        self._explored_units = active_units(explored)

    def fill_inactive_(self, tensor: Tensor) -> None:
        """Zero a local tensor of the weight's shape where the mask is inactive."""
        if not self.is_dense:
            mask, grain = self.addressed_mask.to(tensor.device), self.placement.grain
            if not zero_outside_(tensor, mask, grain):
                keep_active_(tensor, mask, grain)

    @property
    def is_zero_outside(self) -> bool:
        """Whether inactive weights are to be 0 here between steps: no frozen ones, nor parts of sharded weights."""
        return not (self.inactive.act_in_forward or self.placement.is_sharded)

    def note_written(self) -> None:
        """Note that the weight is in line with its mask now."""
        self._written = self.version

    def mask_if_written_(self, *, surely: bool = False) -> None:
        """Zero inactive weights if anything has written to the weight since `note_written`; see `is_zero_outside`.

        Args:
            surely: whether something may have, whatever torch's count of writes says.

        """
        if self.is_zero_outside and (surely or self._written != self.version):
            self.fill_inactive_(self.weight.data)  # no write for autograd: `state_dict` may be called before a backward
            self.note_written()

    @torch.no_grad()
    def exceeds_mask(self) -> bool:
        """Whether an inactive place holds a number, where they are to be 0; reads the whole weight."""
        if self.is_dense or not self.is_zero_outside or not self.inactive.stored:
            return False
        masked = self.weight.clone()
        self.fill_inactive_(masked)
        return bool(((masked == 0) & (self.weight != 0)).any())  # NaN equals nothing

    def is_written_uncounted(self) -> bool:
        """Whether an inactive place holds a number though torch has counted no write since `note_written`."""
        if self.is_dense or not self.is_zero_outside or self._written != self.version:
            return False
        if self._inactive_place is None:
            unit = self.mask.reshape(-1).to(torch.uint8).argmin().reshape(1)
            places = self.placement.elements(unit, self.mask, self.weight)
            index = () if places is None else torch.unravel_index(places[0], self.weight.shape)
            self._inactive_place = tuple(map(int, index))
        return bool(self._inactive_place) and bool(self.weight[self._inactive_place] != 0)

    @torch.no_grad()
    def leave_storage_(self) -> None:
        """Go on with a copy if the layer computes its weight by now from a parameter of the same storage (weight_norm).

        That one is dense: masks of later updates, which may leave a row without units and a norm of 0, are not for it.
        """
        module = self.candidate.module
        if self.placement.is_sharded or not is_computed(module, self.candidate.kind.weight_name):
            return
        if not any(parameter is self.parameter for parameter in module.parameters()):
            self.parameter.set_(self.parameter.clone())  # type: ignore[call-overload]

    @property
    def version(self) -> tuple[int, int]:
        """Torch's count of writes to the parameter, and its address, which ``weight.data = ...`` changes."""
        return self.parameter._version, self.parameter.data_ptr()

    def take_in(self) -> None:
        """Treat inactive weights as the settings say, from now on."""
        self.inactive = inactive_weights(self._mode, self)

    # ------------------------------------------------------------------ the current step

    @property
    def observed(self) -> bool:
        """Whether the window holds a gradient."""
        return self.window is not None and self.window.samples > 0

    @property
    def seen_gradient(self) -> Tensor | None:
        """Sum of the gradients of the window; ``None`` outside one."""
        return None if self.window is None else self.window.gradient

    def begin_step(self) -> None:
        """Allow the next observation and masking of the gradient."""
        self.sampled = False
        self.masked_gradient.forget()

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Put the layer's name before a ValueError."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from error

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return mask, window and backend in plain types, whole; if the weight is sharded, every rank has to call it.

        The window of a sharded weight, which is as large as the weight, is returned on rank 0 only.
        """
        return {
            "shape": list(self.shape),
            "block_size": self.block_size,
            "mask": pack_bits(self.whole_mask()),
            "explored": pack_bits(self.placement.to_whole(self.explored)),
            "backend": self.backend,
            "final_backend": self.final_backend,
            "why": self.why,
            "young": self.young.state_dict(self),
            "window": self.window and self.window.state_dict(self.placement),
            "since": self.since,
        } | self.inactive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a layer of the same shape and block size, as it is between two steps."""
        shape = mask_shape(self.shape, self.block_size)
        before = self.mask
        self.set_mask(unpack_bits(state["mask"], shape), unpack_bits(state["explored"], shape))
        self.inactive.follow_loaded_mask_(self, before)
        self.backend, self.final_backend, self.why = state["backend"], state["final_backend"], state["why"]
        self.since = state.get("since", 0)
        self.young.load_state_dict(state.get("young", ()), self, shape)
        self.inactive.arrange(self)
        self.inactive.load_state_dict(state, self.name)
        self.window = None
        if state["window"]:
            self.window = self.placement.window(self.weight, self.mask)
            self.window.load_state_dict(state["window"], self)
        self.begin_step()
