"""`Packing`: where the active units of one layer's weight are, and the ways from the whole weight to these and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.modules._later_whole import LaterWhole, is_made_later
from lightning_estdgm.sparse._packed_linear import expand, gather
from lightning_estdgm.sparse._topology import BlockTopology


@dataclass(frozen=True, eq=False)
class Packing:
    """How a layer's weight is packed.

    Attributes:
        name: name of the layer in the model, for errors.
        shape: shape ``(out, in, ...)`` of the whole weight.
        transposed: whether the state dict has it as ``(in, out)``.
        block_size: mask unit.
        topology: active units of the matrix ``(out, in * taps)``.
        order: place among the stored units of each active one, in the mask's reading order, int32; ``None``: they are
            stored in that order.

    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    block_size: BlockSize
    topology: BlockTopology
    order: Tensor | None = None

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], transposed: bool, mask: Tensor, block_size: BlockSize) -> Packing:
        """Return the packing of a mask of `method._masks.mask_shape`."""
        return cls(name, shape, transposed, block_size, topology_of(mask, block_size, shape))

    def pack(self, stored: Tensor) -> Tensor:
        """Return the active units of a tensor as the state dict has it, ``[units, rows, columns]``."""
        return gather(self.oriented(stored).flatten(1), self.topology, self.order)

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return the whole tensor of packed values, as the state dict has it, `fill` elsewhere; differentiable."""
        whole = expand(values, self.topology, self.order, fill).view(self.shape)
        return whole.t().contiguous() if self.transposed else whole

    def saved(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return the whole tensor for a state dict: a copy, `fill` where nothing is stored; maybe a `LaterWhole`."""
        values = values.detach()
        if not is_made_later(self.stored_shape):
            return self.unpack(values, fill)
        order = None if self.order is None else self.order.clone()
        then = replace(self, topology=self.topology.apply(torch.clone), order=order)
        return LaterWhole(values, self.stored_shape, partial(then.unpack, values.clone(), fill))

    def oriented(self, stored: Tensor) -> Tensor:
        """Return a tensor as the state dict has it, oriented ``(out, in, ...)``."""
        return stored.t() if self.transposed else stored

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the state dict."""
        return self.shape[::-1] if self.transposed else self.shape


def topology_of(mask: Tensor, block_size: BlockSize, shape: tuple[int, ...]) -> BlockTopology:
    """Return the active units of a weight ``(out, in, ...)`` as those of the matrix ``(out, in * taps)``."""
    if block_size == 1 or len(shape) == 2:
        return BlockTopology.from_mask(mask.flatten(1), block_size, compact=True)
    rows, columns = sides(block_size)
    return BlockTopology.from_mask(mask, (rows, columns * math.prod(shape[2:])), compact=True)
