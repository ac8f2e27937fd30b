"""Checkpoints without their zeros: tensors become their active values and a mask, and come back.

The content of a tensor decides, never its name. A tensor of a masked weight's shape whose entries are all zero where
that weight's mask is inactive is stored as its active values; the mask is the one in `DGMCallback`'s state. Any other
tensor with zeros enough (averaged weights; weights saved without `DGMCallback`'s state) brings a mask of its own, one
bit an entry. The rest stays as it is. A zero that is not stored comes back as ``+0.0``: products with a mask leave
``-0.0`` in half of what is inactive. Among a mask's active values ``-0.0`` is a value like any other.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.method._masks import active_units, keep_active_, mask_shape, pack_bits, unit_size, unpack_bits
from lightning_estdgm.modules._later_whole import LaterWhole, is_made_later, plain

_CALLBACK = ("callbacks", "DGMCallback")  # where a checkpoint keeps the masks
_SMALLEST = 256  # entries; below, what describes a packed tensor outweighs its zeros
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an entry


def pack(checkpoint: Any) -> dict[str, Any]:
    """Take the zeros out of a checkpoint.

    Args:
        checkpoint: nested dicts and lists with tensors; it is not changed, and not copied but for what is packed.

    Returns:
        ``"checkpoint"``: the same with ``None`` where a tensor was packed; ``"packed"``: one entry for each of those.
        Plain types and tensors.

    """
    packer = _Packer(_masks(checkpoint))
    rest = packer.strip(checkpoint, ())
    return {"checkpoint": rest, "packed": packer.packed}


def unpack(content: Mapping[str, Any]) -> Any:
    """Undo `pack`: return the checkpoint, tensors with the same values, dtypes and strides.

    Raises:
        ValueError: if an entry's values do not fit its mask.

    """
    checkpoint, masks = content["checkpoint"], _masks(content["checkpoint"])
    for entry in content["packed"]:
        *way, last = entry["path"]
        node = checkpoint
        for key in way:
            node = node[key]
        shape, make = tuple(entry["shape"]), partial(_unpack_tensor, entry, masks)
        node[last] = LaterWhole(entry["values"], shape, make) if is_made_later(shape) else make()
    return checkpoint


def active_share(checkpoint: Any) -> float:
    """Return the active share of the masked weights of a checkpoint; 1 if it has no masks."""
    masks = _masks(checkpoint).values()
    weights = sum(math.prod(mask.shape) for mask in masks)
    return sum(mask.active for mask in masks) / weights if weights else 1.0


class _Mask:
    """The mask of one weight of shape ``(out, in, ...)``, one bit a unit, as `DGMCallback` saves it."""

    def __init__(self, layer: Mapping[str, Any]) -> None:
        self.shape = tuple(layer["shape"])
        self._block_size = layer["block_size"]
        self._packed = layer["mask"]

    def _units(self) -> Tensor:
        return unpack_bits(self._packed, mask_shape(self.shape, self._block_size))

    @cached_property
    def active(self) -> int:
        """Number of active weights."""
        return active_units(self._units()) * unit_size(self.shape, self._block_size)

    def over_weights(self) -> Tensor:
        """Return it with one entry a weight: bool, on the CPU."""
        return keep_active_(torch.ones(self.shape, dtype=torch.bool, device="cpu"), self._units(), self._block_size)


def _masks(checkpoint: Any) -> dict[str, _Mask]:
    """Find the masks that `DGMCallback` has saved; none, if it has not."""
    node = checkpoint
    for key in (*_CALLBACK, "layers"):
        if not (isinstance(node, Mapping) and key in node):
            return {}
        node = node[key]
    return {name: _Mask(layer) for name, layer in node.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.itemsize])


def _nonzero(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where entries differ from zero, of either sign."""
    has_signed_zero = dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return (bits << 1 if has_signed_zero else bits) != 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether size, strides, dtype and entries are all that there is to a tensor."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.itemsize in _INTEGERS
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
        and torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # entries neither overlap nor gape
    )


class _Packer:
    """Walk through one checkpoint.

    Attributes:
        packed: entries that were packed so far.

    """

    def __init__(self, masks: Mapping[str, _Mask]) -> None:
        self.packed: list[dict[str, Any]] = []
        self._masks = masks
        self._names: dict[tuple[int, ...], list[str]] = {}  # of the masks of one shape, in the model's order
        for name, mask in masks.items():
            self._names.setdefault(mask.shape, []).append(name)
        self._last: tuple[str, Tensor] | None = None

    def strip(self, node: Any, path: tuple[Any, ...]) -> Any:
        """Return `node` without the tensors that were packed; `node` itself if there are none in it."""
        if isinstance(node, Tensor):
            node = plain(node)  # of one layer at a time
            entry = self._pack_tensor(node, path)
            if entry is None:
                return node
            self.packed.append({"path": list(path), **entry})
            return None
        if path == _CALLBACK or type(node) not in (dict, OrderedDict, list):
            return node  # what unpacking needs must be readable before it
        stripped = None
        for key, value in enumerate(node) if isinstance(node, list) else node.items():
            if type(key) not in (int, str):
                continue
            if (rest := self.strip(value, (*path, key))) is not value:
                stripped = copy.copy(node) if stripped is None else stripped
                stripped[key] = rest
        return node if stripped is None else stripped

    def _pack_tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> dict[str, Any] | None:
        if tensor.numel() < _SMALLEST or not _is_plain(tensor):
            return None
        bits = _bits(tensor)
        nonzero = active_units(_nonzero(bits, tensor.dtype))
        entry = {"shape": list(tensor.shape), "stride": list(tensor.stride())}
        for name, transposed in self._candidates(tensor, path):
            if not nonzero <= self._masks[name].active < tensor.numel():
                continue
            values = (bits.t() if transposed else bits)[self._over_weights(name).to(tensor.device)]
            if active_units(_nonzero(values, tensor.dtype)) == nonzero:
                return entry | {"layer": name, "transposed": transposed, "values": values.view(tensor.dtype)}
        if nonzero * tensor.itemsize + (tensor.numel() + 7) // 8 >= tensor.numel() * tensor.itemsize:
            return None
        mask = _nonzero(bits, tensor.dtype)
        return entry | {"mask": pack_bits(mask), "transposed": False, "values": bits[mask].view(tensor.dtype)}

    def _candidates(self, tensor: Tensor, path: tuple[Any, ...]) -> list[tuple[str, bool]]:
        """List the masks that could be the tensor's, the likeliest first, and whether it is stored transposed.

        Only the order is a guess, for speed: a state dict's keys begin with the layer's name, and an optimizer's state
        has no names but follows the model's order, several tensors a weight.
        """
        shape = tuple(tensor.shape)
        found = [(name, False) for name in self._names.get(shape, ())]
        if len(shape) == 2:
            found += [(name, True) for name in self._names.get(shape[::-1], ())]
        key = path[-1] if path and isinstance(path[-1], str) else ""
        named = [x for x in found if key.startswith(f"{x[0]}.")]
        start = next((i for i, x in enumerate(found) if self._last and x[0] == self._last[0]), 0)
        return list(dict.fromkeys(named + found[start:] + found[:start]))

    def _over_weights(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self._masks[name].over_weights()
        return self._last[1]


def _unpack_tensor(entry: Mapping[str, Any], masks: Mapping[str, _Mask]) -> Tensor:
    shape, values = tuple(entry["shape"]), entry["values"]
    mask = masks[entry["layer"]].over_weights() if "layer" in entry else unpack_bits(entry["mask"], shape)
    active = active_units(mask)
    if values.shape != (active,):
        raise ValueError(f"{entry['path']} should hold {active} active values, got {tuple(values.shape)}")
    tensor = torch.empty_strided(shape, entry["stride"], dtype=values.dtype, device=values.device)
    bits = _bits(tensor).zero_()
    (bits.t() if entry["transposed"] else bits).masked_scatter_(mask.to(values.device), _bits(values))
    return tensor
