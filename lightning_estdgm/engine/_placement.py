"""`Placement`: location of a weight's mask and of its units' norms, with a class for whole and one for sharded weights.

`distributed.Shard` knows the elements that this rank holds; a `Placement` derives from it masks and norms for units of
one block size. Which units are active is not decided here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import all_reduce, gather
from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.engine._observation import Window
from lightning_estdgm.method._masks import BlockSize, keep_active_, mask_shape, pool_norm


class Placement(Protocol):
    """Location of one weight's mask and norms.

    "Local" tensors are this rank's part, "whole" ones that of the whole weight. Where a method says "on every rank", it
    communicates if the weight is sharded.

    Attributes:
        is_sharded: whether the weight is sharded over ranks.
        mask_is_local: whether masks are this rank's part only, as for single weights of a sharded weight.
        grain: block size at which masks from `address` address local tensors.
        product: name of the product that computes the layer, where the layout leaves no choice; else empty.

    """

    product: str
    is_sharded: bool
    mask_is_local: bool
    grain: BlockSize

    def device(self, weight: Tensor) -> torch.device:
        """Return the device that the layer computes on; a sharded weight may be offloaded to another."""
        ...

    def mask_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the mask that this rank holds."""
        ...

    def to_local(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole mask, or of anything of its shape."""
        ...

    def to_whole(self, local: Tensor) -> Tensor:
        """Return a whole copy of a local tensor that `to_local` gave, on the CPU; call it on every rank."""
        ...

    def address(self, mask: Tensor) -> Tensor:
        """Return a mask over units in the form that addresses local tensors, at `grain`."""
        ...

    def elements(self, units: Tensor, mask: Tensor, weight: Tensor) -> Tensor | None:
        """Return the places in the local weight of units as indices into the mask; ``None`` where units lie by age."""
        ...

    def unit_norms(self, weight: Tensor) -> Tensor:
        """Return the norm of each unit of the whole weight, on the CPU; call it on every rank."""
        ...

    def saved(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a whole copy of a window's tensor; call it on every rank: if sharded, only rank 0 gets the copy."""
        ...

    # ---- observation: messages between ranks on one gradient

    def whole_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of all units, given that of the parameter."""
        ...

    def window(self, weight: Tensor, mask: Tensor) -> Window:
        """Return an empty observation window."""
        ...

    def observation(self, gradient: Tensor | None, mask: Tensor) -> Tensor | None:
        """Return the message to sum over ranks; ``None`` if there is nothing to observe."""
        ...

    def took_part(self, summed: Tensor) -> Tensor:
        """Return a number that is 0 if no rank has a gradient."""
        ...

    def total(self, summed: Tensor) -> Tensor:
        """Return a number that is finite if the whole gradient is."""
        ...

    def observed_norm(self, weight: Tensor, gradient: Tensor | None, summed: Tensor) -> Tensor:
        """Return the norm of each unit of the local mask."""
        ...

    # ---- mask update: messages between ranks on the weight and the observed gradients

    def evidence(self, weight: Tensor, gradient_sum: Tensor | None) -> Tensor | None:
        """Return the message to sum over ranks before an update; ``None`` if every rank knows all."""
        ...

    def holds_nan(self, evidence: Tensor) -> bool:
        """Whether the weight or its gradients hold NaN, by the summed message."""
        ...

    def score_norms(
        self, weight: Tensor, gradient_sum: Tensor | None, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the norms of the units of weight and summed gradient; the latter ``None`` if none was observed."""
        ...


class _DenseParameter:
    """What placements of a weight have in common whose parameter holds inactive units too."""

    product = ""
    grain: BlockSize
    _shard: Shard
    _block_size: BlockSize

    def address(self, mask: Tensor) -> Tensor:
        """Return the mask as the shard addresses it."""
        return self._shard.expand(mask, self._block_size)

    def elements(self, units: Tensor, mask: Tensor, weight: Tensor) -> Tensor | None:
        """Return indices of all weights in the units."""
        if mask.shape == weight.shape:
            return units
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
        chosen[units.long()] = True
        elements = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        keep_active_(elements, self.address(chosen.view(mask.shape)), self.grain)
        return elements.reshape(-1).nonzero().squeeze(1)

    def whole_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient as it is."""
        return gradient

    def window(self, weight: Tensor, mask: Tensor) -> Window:
        """Return one with sums of this rank's part."""
        return Window(weight, mask)


class WholeWeight(_DenseParameter):
    """A weight that every rank holds whole."""

    is_sharded = False
    mask_is_local = False

    def __init__(self, shard: Shard, block_size: BlockSize) -> None:
        self._shard, self._block_size = shard, block_size
        self.grain = shard.grain(block_size)

    def device(self, weight: Tensor) -> torch.device:
        """Return the weight's device."""
        return weight.device

    def mask_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole mask."""
        return mask_shape(self._shard.shape, self._block_size)

    def to_local(self, whole: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return whole

    def to_whole(self, local: Tensor) -> Tensor:
        """Return a copy on the CPU."""
        return local.cpu().clone()

    def unit_norms(self, weight: Tensor) -> Tensor:
        """Return the norms on the CPU."""
        return gather(self._shard, pool_norm(weight, self._block_size))

    def saved(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a copy."""
        return tensor.clone()

    def observation(self, gradient: Tensor | None, mask: Tensor) -> Tensor | None:
        """Return the norms of the gradient's units, which are the same on all ranks."""
        return None if gradient is None else pool_norm(gradient, self._block_size)

    def took_part(self, summed: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones((), dtype=torch.float64, device=summed.device)

    def total(self, summed: Tensor) -> Tensor:
        """Return the sum of the norms."""
        return summed.sum()

    def observed_norm(self, weight: Tensor, gradient: Tensor | None, summed: Tensor) -> Tensor:
        """Return the norms."""
        return summed

    def evidence(self, weight: Tensor, gradient_sum: Tensor | None) -> Tensor | None:
        """Return None: every rank holds the whole weight."""
        return None

    def holds_nan(self, evidence: Tensor) -> bool:
        """Whether a norm is NaN."""
        return bool(evidence.isnan().any())

    def score_norms(
        self, weight: Tensor, gradient_sum: Tensor | None, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the norms of the units."""
        gradient_norm = None if gradient_sum is None else pool_norm(gradient_sum, self._block_size)
        return pool_norm(weight, self._block_size), gradient_norm


class ShardedWeight(_DenseParameter):
    """A weight of which each rank holds a part: masks of blocks are whole on every rank, of single weights local."""

    is_sharded = True

    def __init__(self, shard: Shard, block_size: BlockSize) -> None:
        self._shard, self._block_size = shard, block_size
        self.grain = shard.grain(block_size)
        self.mask_is_local = block_size == 1
        self._mask_shape = mask_shape(shard.shape, block_size)

    def device(self, weight: Tensor) -> torch.device:
        """Return the device that collectives run on."""
        return self._shard.device

    def mask_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the local weight's shape for single weights, the whole mask's for blocks."""
        return tuple(weight.shape) if self.mask_is_local else self._mask_shape

    def to_local(self, whole: Tensor) -> Tensor:
        """Return the local part for single weights, the whole for blocks."""
        return self._shard.part(whole) if self.mask_is_local else whole

    def to_whole(self, local: Tensor) -> Tensor:
        """Gather masks of single weights; copy those of blocks."""
        return gather(self._shard, local) if self.mask_is_local else local.cpu().clone()

    def unit_norms(self, weight: Tensor) -> Tensor:
        """Sum the squares of blocks over ranks; gather the magnitudes of single weights."""
        if self.mask_is_local:
            return gather(self._shard, pool_norm(weight, 1))
        return self._norm(all_reduce([self._shard], [self._squares(weight)])[0], weight).cpu()

    def saved(self, name: str, tensor: Tensor) -> Tensor | None:
        """Gather the tensor; return it on rank 0 only."""
        whole = gather(self._shard, tensor) if name == "gradient" else self.to_whole(tensor)
        return whole if torch.distributed.get_rank() == 0 else None

    def observation(self, gradient: Tensor | None, mask: Tensor) -> Tensor | None:
        """Return 1 and the squares of blocks, or 1 and the sum of single magnitudes; zeros without a gradient."""
        if gradient is None:
            size = 2 if self.mask_is_local else 1 + mask.numel()
            return torch.zeros(size, dtype=torch.float64, device=mask.device)
        one = torch.ones(1, dtype=torch.float64, device=gradient.device)
        if self.mask_is_local:
            return torch.cat([one, gradient.abs().sum(dtype=torch.float64)[None]])
        return torch.cat([one, self._squares(gradient)])

    def took_part(self, summed: Tensor) -> Tensor:
        """Return the number of ranks that have a gradient."""
        return summed[0]

    def total(self, summed: Tensor) -> Tensor:
        """Return the sum of squares or magnitudes."""
        return summed[1:].sum()

    def observed_norm(self, weight: Tensor, gradient: Tensor | None, summed: Tensor) -> Tensor:
        """Return the norms of blocks from the summed squares, those of single weights from the local gradient."""
        if not self.mask_is_local:
            return self._norm(summed[1:], weight)
        return torch.zeros(weight.shape, device=weight.device) if gradient is None else pool_norm(gradient, 1)

    def evidence(self, weight: Tensor, gradient_sum: Tensor | None) -> Tensor | None:
        """Return the squares of the blocks of weight and gradient; for single weights the number of NaNs."""
        if self.mask_is_local:
            return weight.isnan().sum(dtype=torch.float64)[None]
        gradient = torch.zeros_like(weight) if gradient_sum is None else gradient_sum
        return torch.cat([self._squares(weight), self._squares(gradient)])

    def holds_nan(self, evidence: Tensor) -> bool:
        """Whether a square of a block is NaN, or the number of NaNs is not 0."""
        return bool(evidence.isnan().any()) or (self.mask_is_local and bool(evidence.any()))

    def score_norms(
        self, weight: Tensor, gradient_sum: Tensor | None, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the norms of blocks from the summed squares, those of single weights from this rank's part."""
        if evidence is None or self.mask_is_local:
            gradient_norm = None if gradient_sum is None else pool_norm(gradient_sum, 1)
            return pool_norm(weight, 1), gradient_norm
        weight_squares, gradient_squares = evidence.chunk(2)
        return self._norm(weight_squares, weight), self._norm(gradient_squares, weight)

    def _squares(self, local: Tensor) -> Tensor:
        """Return this rank's share of the sum of squares of each unit."""
        wide = local.to(torch.promote_types(local.dtype, torch.float32))
        return self._shard.pool(wide.square(), self._block_size).flatten().double()

    def _norm(self, squares: Tensor, like: Tensor) -> Tensor:
        """Return the norm of each unit from its sum of squares."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return squares.sqrt().to(dtype).view(self._mask_shape)


def placement_of(shard: Shard, block_size: BlockSize) -> Placement:
    """Return the placement of a weight with the layout `shard`."""
    return ShardedWeight(shard, block_size) if shard.groups else WholeWeight(shard, block_size)
