"""`PackedStates`: the optimizers' state dicts have the shapes of whole weights, whatever is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._later_whole import plain
from lightning_estdgm.modules._own_hook import OwnHook

Fill = Callable[[MaskedWeight, Optimizer, str], float]
"""Number that an optimizer's state has outside the mask, by weight, the optimizer and the entry's name."""


class PackedStates:
    """Hooks by which ``optimizer.state_dict()`` unpacks, and ``load_state_dict`` packs the state of packed weights.

    State may be loaded before the masks of its run: what is not 0 outside the mask is kept whole beside it, until
    `pack_kept_` or the next step.

    Only optimizers whose own ``state_dict`` runs torch's hooks are reached, so a wrapper with one of its own saves the
    packed shapes; these are loaded as they are. A ``load_state_dict`` that runs none, as that of bitsandbytes or of a
    wrapper, leaves whole state, which `pack_left` packs.

    Args:
        weights: packed weights.
        fill: see `Fill`.

    """

    def __init__(self, weights: Sequence[MaskedWeight], fill: Fill) -> None:
        self._weights = {id(weight.parameter): weight for weight in weights}
        self._fill = fill
        self._handles: list[Any] = []
        self._load_by_themselves: list[Optimizer] = []

    def use(self, optimizers: Sequence[Optimizer]) -> None:
        """Hook these optimizers, and no others."""
        self.close()
        found = {id(inner): inner for optimizer in optimizers for inner in nested_optimizers(optimizer)}
        for optimizer in found.values():
            if "_optimizer_state_dict_post_hooks" in vars(optimizer):
                self._handles.append(optimizer.register_state_dict_post_hook(OwnHook(self._unpack)))
                self._handles.append(optimizer.register_load_state_dict_pre_hook(OwnHook(self._pack)))
            if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
                self._load_by_themselves.append(optimizer)

    def pack_left(self, weight: MaskedWeight) -> None:
        """Pack the state of a packed weight that a ``load_state_dict`` has left whole."""
        module: Any = weight.candidate.module
        for optimizer in self._load_by_themselves:
            state = optimizer.state.get(weight.parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == module._estdgm_packing.stored_shape:
                    state[name] = _packed(weight, name, value)

    def close(self) -> None:
        """Remove the hooks. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._load_by_themselves.clear()

    def _unpack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = dict(state_dict["state"])
        for index, weight, state in self._held(optimizer, state_dict):
            make = partial(self._whole, optimizer, weight)
            changed[index] = {name: tree_map_only(Tensor, partial(make, name), x) for name, x in state.items()}
        return {**state_dict, "state": changed}

    def _whole(self, optimizer: Optimizer, weight: MaskedWeight, name: str, value: Tensor) -> Tensor:
        if value.shape != weight.parameter.shape:
            return value
        packing: Any = weight.candidate.module._estdgm_packing
        return packing.saved(value, self._fill(weight, optimizer, name))

    def _pack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        weights = {index: weight for index, weight, _ in self._held(optimizer, state_dict)}
        changed = dict(state_dict["state"])
        for index, state in changed.items():
            if isinstance(state, Mapping):
                weight = weights.get(index)
                make = partial(_packed, weight)
                changed[index] = {name: tree_map_only(Tensor, partial(make, name), x) for name, x in state.items()}
                if weight is not None:
                    _keep_others(optimizer, weight, state, changed[index])
        return {**state_dict, "state": changed}

    def _held(
        self, optimizer: Optimizer, state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[Any, MaskedWeight, Mapping[str, Any]]]:
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, held, strict=False):
            weight, state = self._weights.get(id(parameter)), state_dict["state"].get(index)
            if weight is not None and weight.placement.product and isinstance(state, Mapping):
                yield index, weight, state


def pack_kept_(weight: MaskedWeight) -> None:
    """Pack anew the state that was loaded before the mask that the weight has now, and let go of the whole."""
    module: Any = weight.candidate.module
    for (optimizer, name), kept in module._estdgm_loaded_states.items():
        held = optimizer.state[weight.parameter].get(name)
        if held is None:  # cleared since
            continue
        for entry, value in zip(tree_leaves(held), tree_leaves(kept), strict=True):
            if _is_whole(weight, value):
                entry.copy_(_packed(weight, name, value))
    module._estdgm_loaded_states = {}


def _keep_others(
    optimizer: Optimizer, weight: MaskedWeight, state: Mapping[str, Any], packed: Mapping[str, Any]
) -> None:
    """Keep the entries that are not 0 outside the mask, so those of another one."""
    module: Any = weight.candidate.module
    for name, entry in state.items():
        pairs = list(zip(tree_leaves(entry), tree_leaves(packed[name]), strict=True))
        pairs = [(whole, values) for whole, values in pairs if _is_whole(weight, whole)]
        if any(int(torch.count_nonzero(plain(x))) != int(torch.count_nonzero(y)) for x, y in pairs):
            if module._estdgm_held:
                module._estdgm_loaded_states[optimizer, name] = entry
        elif pairs:
            module._estdgm_loaded_states.pop((optimizer, name), None)


def _is_whole(weight: MaskedWeight, value: Any) -> bool:
    module: Any = weight.candidate.module
    return isinstance(value, Tensor) and tuple(value.shape) == module._estdgm_packing.stored_shape and value.numel() > 1


def _packed(weight: MaskedWeight | None, name: str, value: Tensor) -> Tensor:
    value = plain(value)
    if weight is None or value.numel() < 2:
        return value
    packing: Any = weight.candidate.module._estdgm_packing
    if tuple(value.shape) == packing.stored_shape:
        return packing.pack(value.to(packing.topology.device))
    if value.shape != weight.parameter.shape and value.dim() > 1:
        raise ValueError(
            f"layer {weight.name!r}: the optimizer's state {name!r} has shape {tuple(value.shape)}, expected that of "
            f"the whole weight, {packing.stored_shape}: load the checkpoint of the same model, and masks before the "
            "optimizer's state"
        )
    return value
