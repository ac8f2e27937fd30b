"""`AbsentWeights`: inactive weights that are not stored. Values and optimizer state move along with the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_estdgm.engine._inactive import InactiveWeights
from lightning_estdgm.engine._packed_layout import PackedShard, PackedWeight, Store
from lightning_estdgm.engine._packed_states import pack_kept_
from lightning_estdgm.engine._placement import placement_of
from lightning_estdgm.method._masks import keep_active_
from lightning_estdgm.modules._packed_forward import (
    PackedForward,
    pack_,
    repack_,
    resize_,
    unpack_,
)
from lightning_estdgm.modules._packing import Packing

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight

_KEY = "has_trained"  # key in a layer's state


class AbsentWeights(InactiveWeights):
    """Inactive weights are not stored: the parameter holds the active units only.

    Args:
        store: the run.
        weight: weight; its layer stores the whole weight until the first mask is there.

    Attributes:
        has_trained: whether a gradient has reached it.
        original: the whole weight as it was before the run, until that has begun.

    """

    stored = False
    when_dropped = "given up"

    def __init__(self, store: Store, weight: MaskedWeight) -> None:
        self.has_trained = False
        self.original: Tensor | None = None
        self._store = store
        self._module: Any = weight.candidate.module
        self._layout: PackedWeight | None = None

    def before_step(self, weight: MaskedWeight) -> None:
        """Refuse to step a weight that was loaded without its mask; pack what was loaded whole."""
        if self._layout is None:
            return
        if self._module._estdgm_loaded is not None:
            raise ValueError(
                f"layer {weight.name!r}: a weight was loaded that is not 0 outside the mask, so that of another mask: "
                "load the state of its run too (ckpt_path=, or DGMController.load_state_dict), or load it before the "
                "run; nothing of it is lost, state_dict() has it"
            )
        self._store.pack_loaded_states(weight)
        self._module._estdgm_loaded_states = {}  # this mask is the one to go on with

    def with_gradients(self, weight: MaskedWeight, grad_scale: float | Tensor) -> None:
        """Refuse a step of weights that are used in a way that is not theirs."""
        if weight.parameter.grad is None or self._layout is None:
            return
        if not self._module._estdgm_called:
            raise ValueError(
                f"layer {weight.name!r}: its weight is used by itself, or by a copy: its forward was not called. "
                "storage='packed' computes there: leave it out by Selection(exclude=...), or use storage='dense'"
            )
        self.has_trained = True

    def after_step(self, weight: MaskedWeight) -> None:
        """Forget the whole gradient, if one was observed."""
        self.forget()

    def forget(self) -> None:
        """Free the whole gradient."""
        if self._layout is not None:
            self._layout.seen.forget()

    def apply_mask_(self, weight: MaskedWeight) -> None:
        """Store the units of the mask, and no others."""
        if self._layout is None:
            self._pack(weight)
        else:
            self._move(weight, self._layout)

    def follow_loaded_mask_(self, weight: MaskedWeight, before: Tensor) -> None:
        """Store the units of the mask, and no others."""
        self.apply_mask_(weight)

    def mask_copy_(self, weight: MaskedWeight, local: Tensor) -> None:
        """Zero what is outside the mask."""
        keep_active_(local, weight.mask.to(local.device), weight.block_size)

    def store_copy_(self, weight: MaskedWeight, module: Any) -> None:
        """Pack a copy that is stored whole, and have a packed one follow the mask: grown units are 0 there."""
        parameter = module._parameters[weight.candidate.kind.weight_name]
        mask = weight.mask.to(parameter.device)
        order = None if self._layout is None else self._layout.order
        order = None if order is None else order.to(mask.device, copy=True)
        if isinstance(module, PackedForward):
            repack_(module, mask, order)
            return
        name, transposed = weight.name, weight.candidate.kind.transposed
        pack_(module, replace(Packing.of(name, weight.shape, transposed, mask, weight.block_size), order=order))
        module._estdgm_held = False

    def _pack(self, weight: MaskedWeight) -> None:
        candidate = weight.candidate
        packing = Packing.of(weight.name, weight.shape, candidate.kind.transposed, weight.mask, weight.block_size)
        carried = self._carried(weight)
        packed = [packing.pack(entry.view(packing.stored_shape)) for entry in carried]
        gradient = weight.parameter.grad
        weight.parameter.grad = None
        self.original = weight.parameter.detach() if self._store.keeps_originals else None
        pack_(self._module, packing)
        for entry, values in zip(carried, packed, strict=True):
            resize_(entry, values.flatten() if entry.dim() == 1 else values)
        if gradient is not None:
            weight.parameter.grad = packing.pack(gradient)
        self._store.note_resized()
        self._settle(weight)

    def _move(self, weight: MaskedWeight, layout: PackedWeight) -> None:
        module, parameter = self._module, weight.parameter
        loaded = module._estdgm_loaded
        if loaded is None and torch.equal(layout.stored, weight.mask):
            return
        old, new = layout.stored.flatten(), weight.mask.flatten()
        count, size = parameter.shape[0], int(torch.count_nonzero(new))
        kept = new[old].nonzero().squeeze(1)
        if layout.order is not None:
            kept = layout.order[kept]
        places = (new.cumsum(0) - 1)[old & new]

        def moved(tensor: Tensor) -> Tensor:
            units = tensor.detach().view(count, -1)
            return units.new_zeros(size, units.shape[1]).index_copy_(0, places, units[kept])

        carried = self._carried(weight)
        values = [moved(entry) for entry in carried]
        gradient = None if parameter.grad is None else moved(parameter.grad).view(size, *parameter.shape[1:])
        own = moved(parameter).view(size, *parameter.shape[1:])
        packing = module._estdgm_packing = replace(module._estdgm_packing, order=None)
        packing.topology.update_(weight.mask.flatten(1))
        if loaded is not None:
            own = packing.pack(loaded.to(parameter.device)).to(parameter.dtype)
            module._estdgm_loaded = None
        is_resized = own.shape != parameter.shape
        parameter.grad = None
        resize_(parameter, own)
        shape = own.shape
        for entry, value in zip(carried, values, strict=True):
            resize_(entry, value.flatten() if entry.dim() == 1 else value.view(shape))
        pack_kept_(weight)
        parameter.grad = gradient
        if is_resized:
            self._store.note_resized()
        self._settle(weight)

    def arrange(self, weight: MaskedWeight) -> None:
        """Have each cohort of young units lie in one piece, after those that are young no more."""
        layout, module, cohorts = self._layout, self._module, weight.young.cohorts
        if layout is None or (not cohorts and layout.order is None):
            return
        source = layout.by_age(cohorts)  # of each place, a number in reading order
        order = torch.empty_like(source, dtype=torch.int32)
        order[source] = torch.arange(len(source), dtype=torch.int32, device=source.device)
        if layout.order is not None:
            source = layout.order[source]
        gradient = weight.parameter.grad
        for tensor in (*self._carried(weight), weight.parameter, *([] if gradient is None else [gradient])):
            units = tensor.detach().view(len(source), -1)
            units.copy_(units[source])
        module._estdgm_packing = replace(module._estdgm_packing, order=order if cohorts else None)

    def give_up(self, weight: MaskedWeight) -> None:
        """Store the whole weight again: as it was before the run or as loaded; else the active units and 0."""
        if self._layout is None:
            return
        module, packing = self._module, self._module._estdgm_packing
        carried = self._carried(weight)
        whole = [packing.unpack(entry.view(weight.parameter.shape)) for entry in carried]
        loaded = module._estdgm_loaded
        unpack_(module, self.original if loaded is None else loaded)
        for entry, values in zip(carried, whole, strict=True):
            resize_(entry, values.flatten() if entry.dim() == 1 else values)
        self.original, self._layout = None, None
        self._store.note_resized()
        weight.lay_out(weight.candidate.shard, placement_of(weight.candidate.shard, weight.block_size))

    def state_dict(self) -> dict[str, Any]:
        """Return whether a gradient has reached it."""
        return {_KEY: self.has_trained}

    def load_state_dict(self, state: Mapping[str, Any], name: str) -> None:
        """Load whether a gradient has reached it: what dense storage masks has trained."""
        super().load_state_dict(state, name)
        self.has_trained = state.get(_KEY, True)

    def _carried(self, weight: MaskedWeight) -> list[Tensor]:
        """Return the state entries that move along; refuse those that cannot, before anything has changed."""
        entries = list(self._store.states_of(weight))
        shape = weight.parameter.shape
        for name, entry in entries:
            is_plain = not hasattr(entry, "__tensor_flatten__") and entry._base is None
            if not (is_plain and (entry.shape == shape or entry.dim() == 1)):
                raise ValueError(
                    f"layer {weight.name!r}: the optimizer's state {name!r}, {type(entry).__name__} of shape "
                    f"{tuple(entry.shape)}, cannot move along with the mask of a packed weight of shape "
                    f"{tuple(shape)}: use storage='dense'"
                )
        return [entry for _, entry in entries]

    def _settle(self, weight: MaskedWeight) -> None:
        """Lay the weight out anew, by the mask that it has now."""
        if self._layout is None:
            self._layout = PackedWeight(weight, self._module, self._store)
            self._module._estdgm_observer = self._layout.seen
        self._layout.stored = weight.mask
        weight.lay_out(PackedShard(self._module, weight.shape), self._layout)
        weight.masked_gradient.forget()
