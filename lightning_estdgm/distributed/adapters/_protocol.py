"""`Adapter`: protocol of a strategy's adapter, and the discovery of all installed ones.

An adapter is one module of this folder with a module-level ``ADAPTER``, or an entry point of the group
``lightning_estdgm.strategies`` that loads to one. `shard_of` asks them all, so that a plain loop needs no strategy.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_estdgm._registry import offers
from lightning_estdgm.distributed import adapters as adapters_folder
from lightning_estdgm.distributed._shard import Shard

ENTRY_POINT_GROUP = "lightning_estdgm.strategies"

_LAST = "base"  # it takes every weight


@runtime_checkable
class Adapter(Protocol):
    """Adapter of one way to spread a model over ranks.

    Attributes:
        name: name of the adapter.
        strategies: names of the classes of Lightning (and Fabric) strategies that it serves, subclasses included.

    """

    name: str
    strategies: tuple[str, ...]

    def check(self, strategy: Any) -> None:
        """Raise ValueError with the setting to use if the strategy's settings cannot work."""
        ...

    def model(self, strategy: Any) -> nn.Module:
        """Return the module that a `DGMController` should be given for a strategy that is set up."""
        ...

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        """Return the layout of a layer's weight over ranks, or None if this adapter does not know it.

        Args:
            model: model that the layer belongs to.
            module: layer.
            weight_name: name of its parameter.
            transposed: whether the weight is stored ``(in, out)``.

        Raises:
            ValueError: if the weight is spread in a way that cannot be masked.

        """
        ...


_REFUSED = {
    "DeepSpeedStrategy": "it partitions weights where nothing can mask them",
    "XLAStrategy": "it was never tried on XLA devices",
    "XLAFSDPStrategy": "it was never tried on XLA devices",
    "SingleDeviceXLAStrategy": "it was never tried on XLA devices",
}
"""Unsupported strategies, which subclass supported ones or are likely to be asked for, and the reasons."""


@functools.lru_cache(maxsize=1)
def adapters() -> dict[str, Adapter]:
    """Return every installed adapter by name, the one of whole weights last.

    Raises:
        TypeError: if a module or entry point offers something that is no adapter.
        ValueError: if two adapters have one name.

    """
    found: dict[str, Adapter] = {}
    for offer in sorted(offers(adapters_folder, "ADAPTER", ENTRY_POINT_GROUP), key=lambda offer: offer.is_own):
        adapter = offer.load()
        if not isinstance(adapter, Adapter):
            raise TypeError(f"{offer.origin} must be an Adapter (name, strategies, check, model, shard)")
        if adapter.name in found:
            raise ValueError(f"{offer.origin}: the adapter name {adapter.name!r} is already taken")
        found[adapter.name] = adapter
    return found | {_LAST: found.pop(_LAST)}


def adapter_for(strategy: Any) -> Adapter:
    """Return the adapter of a Lightning or Fabric strategy, found by the names of its class and base classes.

    Raises:
        ValueError: if there is none; the message lists the supported strategies.

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
    """Return the layout of a layer's weight over ranks; see `Adapter.shard`."""
    for adapter in adapters().values():
        shard = adapter.shard(model, module, weight_name, transposed)
        if shard is not None:
            return shard
    raise AssertionError("the adapter of whole weights knows every weight")
