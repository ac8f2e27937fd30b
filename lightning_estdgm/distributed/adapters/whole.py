"""Weights that every rank holds whole: one device, DDP, plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.distributed._shard import Shard, pool_box
from lightning_estdgm.method._masks import BlockSize, sides


class Whole:
    """Layout of a weight that every rank holds whole. Local tensors are views.

    Args:
        weight: the weight as stored.
        transposed: whether it is stored ``(in, out)``.
        stacked: whether it is a contiguous stack ``(experts, rows, columns)``, taken as ``(experts * rows, columns)``.

    """

    groups: tuple[Any, ...] = ()
    why_dense = ""

    def __init__(self, weight: Tensor, transposed: bool = False, stacked: bool = False) -> None:
        self._transposed, self._stacked = transposed, stacked
        self._stored = weight.shape
        self.shape = tuple(self._oriented(weight).shape)
        self.device = weight.device

    def _oriented(self, tensor: Tensor) -> Tensor:
        if self._stacked:
            return tensor.view(-1, tensor.shape[-1])  # raises where it would have to copy
        return tensor.t() if self._transposed else tensor

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the weight's shape."""
        return tensor.shape == self._stored

    def local(self, tensor: Tensor) -> Tensor:
        """Return the oriented tensor."""
        return self._oriented(tensor.detach())

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy."""
        return whole.clone()

    def spread(self, local: Tensor) -> Tensor:
        """Return a copy."""
        return local.clone()

    def index(self, device: torch.device) -> Tensor:
        """Return all positions."""
        return torch.arange(math.prod(self.shape), device=device).view(self.shape)

    def expand(self, units: Tensor, block_size: BlockSize) -> Tensor:
        """Return the mask as it is."""
        return units

    def grain(self, block_size: BlockSize) -> BlockSize:
        """Return the mask's own block size."""
        return block_size

    def pool(self, squares: Tensor, block_size: BlockSize) -> Tensor:
        """Sum over each unit."""
        flat = squares.flatten(2).sum(2) if squares.dim() > 2 and block_size != 1 else squares
        return squares if block_size == 1 else pool_box(flat, (0, 0), sides(block_size), self.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return tensor


class WholeAdapter:
    """Strategies that leave every weight whole on every rank."""

    name = "base"
    strategies = ("SingleDeviceStrategy", "DDPStrategy")

    def check(self, strategy: Any) -> None:
        """Accept every setting."""

    def model(self, strategy: Any) -> nn.Module:
        """Return the LightningModule."""
        return strategy.lightning_module

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        """Return the weight as it is."""
        weight = getattr(module, weight_name)
        if weight.dim() < 2:
            from lightning_estdgm.distributed.adapters._protocol import adapters  # it discovers this module

            raise ValueError(
                f"the weight of a {type(module).__name__} must have at least two dimensions, got shape "
                f"{tuple(weight.shape)}: it is spread over ranks in a way that none of {list(adapters())} knows"
            )
        return Whole(weight, transposed)


ADAPTER = WholeAdapter()
