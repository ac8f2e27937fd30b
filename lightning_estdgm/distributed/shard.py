"""How the weights of a model lie over ranks: `Shard`, and the adapter of each strategy that spreads them.

An adapter is one module of this package with a module-level ``ADAPTER``, or an entry point of the group
``lightning_estdgm.strategies`` that loads to one. `shard_of` asks them all, so that a plain loop needs no strategy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ENTRY_POINT_GROUP",
    "Adapter",
    "Shard",
    "Whole",
    "adapter_for",
    "adapters",
    "agree",
    "all_reduce",
    "gather",
    "local_tensor",
    "pool_box",
    "shard_of",
]

ENTRY_POINT_GROUP = "lightning_estdgm.strategies"


class Shard(Protocol):
    """How this rank's part of one weight lies in the whole weight.

    "Local" tensors have the shape of this rank's part, oriented ``(out, in, ...)`` where the part is a box, flat where
    it is a range; "whole" ones have the weight's shape ``(out, in, ...)``; masks over units are always whole, but for
    single weights (``block_size=1``) of a sharded weight, which have local masks.

    Attributes:
        shape: of the whole weight, ``(out, in, ...)``.
        groups: process groups that the weight is spread over, in the order to reduce in; ``()`` where it is whole.
        device: that collectives run on.
        why_dense: why the layer's forward cannot use a sparse operator, in words; ``""`` where it can.

    """

    shape: tuple[int, ...]
    groups: tuple[Any, ...]
    device: torch.device
    why_dense: str

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` (a gradient, or optimizer state) lies over the ranks as this weight does."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the local part of a parameter, gradient or optimizer state that lies like it; shares its storage."""
        ...

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy of the local part of a tensor of the whole weight's shape, on `whole`'s device."""
        ...

    def spread(self, local: Tensor) -> Tensor:
        """Return a tensor of the whole weight's shape, ``local`` in its place and 0 elsewhere."""
        ...

    def index(self, device: torch.device) -> Tensor:
        """Return the position of each local element in the flattened whole weight, int64, in the local shape."""
        ...

    def expand(self, units: Tensor, block_size: int) -> Tensor:
        """Return a mask over units as one that addresses local tensors at a grain of `grain` (it may broadcast)."""
        ...

    def grain(self, block_size: int) -> int:
        """Return the block size with which `expand`'s masks address local tensors: 1 unless the weight is whole."""
        ...

    def pool(self, squares: Tensor, block_size: int) -> Tensor:
        """Sum a local tensor over each unit; units that other ranks hold too are theirs to add. Of the mask's shape."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on `device` over the ranks that the weight is spread over, in place."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """What the package has to know of one way to spread a model over ranks.

    Attributes:
        name: of the adapter.
        strategies: names of the classes of Lightning (and Fabric) strategies that it serves, subclasses included.

    """

    name: str
    strategies: tuple[str, ...]

    def check(self, strategy: Any) -> None:
        """Raise ValueError, naming what to use, if the strategy is set in a way that cannot work."""
        ...

    def model(self, strategy: Any) -> nn.Module:
        """Return the module that a `DGMController` should be given for a strategy that is set up."""
        ...

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        """Return how a layer's weight lies over ranks, or None where this adapter does not know it.

        Args:
            model: the model that the layer belongs to.
            module: the layer.
            weight_name: of its parameter.
            transposed: the weight is stored ``(in, out)``.

        Raises:
            ValueError: if the weight is spread in a way that cannot be masked.

        """
        ...


class Whole:
    """A weight that every rank holds whole: one device, DDP, plain loops. Views only, no copies."""

    groups: tuple[Any, ...] = ()
    why_dense = ""

    def __init__(self, weight: Tensor, transposed: bool = False) -> None:
        self._transposed = transposed
        self._stored = weight.shape
        self.shape = tuple(self._oriented(weight).shape)
        self.device = weight.device

    def _oriented(self, tensor: Tensor) -> Tensor:
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

    def expand(self, units: Tensor, block_size: int) -> Tensor:
        """Return the mask as it is."""
        return units

    def grain(self, block_size: int) -> int:
        """Return the mask's own block size."""
        return block_size

    def pool(self, squares: Tensor, block_size: int) -> Tensor:
        """Sum over each unit."""
        flat = squares.flatten(2).sum(2) if squares.dim() > 2 and block_size > 1 else squares
        return squares if block_size == 1 else pool_box(flat, (0, 0), (block_size, block_size), self.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return tensor


class _Base:
    """Strategies that leave every weight whole on every rank."""

    name = "base"
    strategies = ("SingleDeviceStrategy", "DDPStrategy")

    def check(self, strategy: Any) -> None:
        pass

    def model(self, strategy: Any) -> nn.Module:
        return strategy.lightning_module

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        weight = getattr(module, weight_name)
        if weight.dim() < 2:
            raise ValueError(
                f"the weight of a {type(module).__name__} must have at least two dimensions, got shape "
                f"{tuple(weight.shape)}: it is spread over ranks in a way that none of {list(adapters())} knows"
            )
        return Whole(weight, transposed)


# ---- finding the adapter

_REFUSED = {
    "DeepSpeedStrategy": "it partitions weights where nothing can mask them",
    "XLAStrategy": "it was never tried on XLA devices",
    "XLAFSDPStrategy": "it was never tried on XLA devices",
    "SingleDeviceXLAStrategy": "it was never tried on XLA devices",
}
"""Strategies that are subclasses of supported ones, or likely to be asked for, and why they are not supported."""


@functools.lru_cache(maxsize=1)
def adapters() -> dict[str, Adapter]:
    """Every installed adapter by name, the one of whole weights last.

    Raises:
        TypeError: a module or entry point offers something that is no adapter.
        ValueError: two adapters of one name.

    """
    found: dict[str, Adapter] = {}

    def add(adapter: object, origin: str) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{origin} must be an Adapter (name, strategies, check, model, shard)")
        if adapter.name in found:
            raise ValueError(f"{origin}: the adapter name {adapter.name!r} is already taken")
        found[adapter.name] = adapter

    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        add(point.load(), f"entry point {point.name!r} ({point.value})")
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        adapter = getattr(importlib.import_module(info.name), "ADAPTER", None)
        if adapter is not None:
            add(adapter, f"{info.name}.ADAPTER")
    add(_Base(), __name__)
    return found


def adapter_for(strategy: Any) -> Adapter:
    """Return the adapter of a Lightning or Fabric strategy, found by the names of its class and base classes.

    Raises:
        ValueError: there is none; the message lists the strategies that are supported.

    """
    for name in (cls.__name__ for cls in type(strategy).__mro__):
        for adapter in adapters().values():
            if name in adapter.strategies:
                return adapter
        if name in _REFUSED:
            break
    known = sorted({name for adapter in adapters().values() for name in adapter.strategies})
    name = next((cls.__name__ for cls in type(strategy).__mro__ if cls.__name__ in _REFUSED), "")
    raise ValueError(
        f"expected a strategy out of {known} (or a subclass), got {type(strategy).__name__}"
        + (f": {_REFUSED[name]}" if name else "")
    )


def shard_of(model: nn.Module, module: nn.Module, weight_name: str, transposed: bool = False) -> Shard:
    """Return how a layer's weight lies over ranks; see `Adapter.shard`."""
    for adapter in adapters().values():
        shard = adapter.shard(model, module, weight_name, transposed)
        if shard is not None:
            return shard
    raise AssertionError("the adapter of whole weights knows every weight")


# ---- collectives


def all_reduce(shards: Sequence[Shard], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over the ranks that its weight is spread over; one collective for all that go the same way.

    Args:
        shards: one for each tensor.
        tensors: any shapes; those of whole weights come back as they are.

    """
    results = list(tensors)
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, (shard, tensor) in enumerate(zip(shards, tensors, strict=True)):
        if shard.groups:
            batches.setdefault((*map(id, shard.groups), tensor.dtype), []).append(i)
    for members in batches.values():
        first = shards[members[0]]
        buffer = first.sum_(torch.cat([tensors[i].flatten().to(first.device) for i in members]))
        for i, summed in zip(members, buffer.split([tensors[i].numel() for i in members]), strict=True):
            results[i] = summed.view(tensors[i].shape).to(tensors[i].device)
    return results


def agree(shards: Sequence[Shard], flag: bool) -> bool:
    """Return whether `flag` holds on any rank that holds a part of one of the weights."""
    seen: set[tuple[int, ...]] = set()
    for shard in shards:
        key = tuple(map(id, shard.groups))
        if key and key not in seen:
            seen.add(key)
            flag = bool(shard.sum_(torch.tensor(float(flag), device=shard.device)).item() > 0)
    return flag


def gather(shard: Shard, local: Tensor) -> Tensor:
    """Return the whole of what every rank holds a part of, on the CPU of every rank; one layer's memory in passing."""
    if not shard.groups:
        return local.cpu().clone()
    number = local.to(torch.uint8) if local.dtype == torch.bool else local
    whole = shard.sum_(shard.spread(number.to(shard.device)))
    return whole.to(device="cpu", dtype=local.dtype)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be a DTensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def pool_box(box: Tensor, offset: Sequence[int], unit: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Sum a box of a matrix over the units of the whole matrix.

    Args:
        box: ``(rows, columns)``, maybe empty.
        offset: row and column of its first element in the whole.
        unit: rows and columns of a unit.
        shape: of the whole; units divide it.

    Returns:
        ``(shape[0] / unit[0], shape[1] / unit[1])``; 0 where the box is not.

    """
    out = box.new_zeros(shape[0] // unit[0], shape[1] // unit[1])
    if box.numel() == 0:
        return out
    before = [offset[d] % unit[d] for d in (0, 1)]
    after = [-(offset[d] + box.shape[d]) % unit[d] for d in (0, 1)]
    if any(before + after):
        box = F.pad(box, (before[1], after[1], before[0], after[0]))
    first = [offset[d] // unit[d] for d in (0, 1)]
    rows, columns = box.shape[0] // unit[0], box.shape[1] // unit[1]
    sums = box.unflatten(1, (columns, unit[1])).unflatten(0, (rows, unit[0])).sum((1, 3))
    out[first[0] : first[0] + rows, first[1] : first[1] + columns] = sums
    return out
