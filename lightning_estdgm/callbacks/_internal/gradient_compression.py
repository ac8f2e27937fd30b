"""`GradientCompression`: `distributed.active_units_hook` on a Trainer's DDP model, for `DGMCallback`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_estdgm.distributed._comm_hook import WIRE_DTYPES, ActiveUnits, active_units_hook
from lightning_estdgm.engine._controller import DGMController


class GradientCompression:
    """All-reduce of the gradients of active units only, in one fit; on a single device it does nothing.

    DDP takes one hook. If the user gave an element-wise hook of torch to ``DDPStrategy(ddp_comm_hook=)``, gradients are
    sent in its dtype. (This also works on the CPU, where Lightning ignores that argument.)

    Args:
        trainer: Trainer whose strategy is not set up yet.

    Raises:
        ValueError: if the strategy is not DDP, or the user's hook cannot be combined with packing.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        self._strategy: DDPStrategy | None = None
        self._units: ActiveUnits | None = None
        self._logged_bytes = 0
        if isinstance(strategy, SingleDeviceStrategy):
            return
        if not isinstance(strategy, DDPStrategy):
            raise ValueError(
                f"compress_gradients=True works under DDPStrategy, got {type(strategy).__name__}: sharded strategies "
                "reduce gradients by themselves; leave compress_gradients=False"
            )
        self._theirs = strategy._ddp_comm_hook
        if strategy._ddp_comm_wrapper is not None or (self._theirs is not None and self._theirs not in WIRE_DTYPES):
            theirs = strategy._ddp_comm_wrapper or self._theirs
            names = ", ".join(hook.__name__ for hook in WIRE_DTYPES)
            raise ValueError(
                f"compress_gradients=True cannot be combined with ddp_comm_hook={getattr(theirs, '__name__', theirs)}: "
                f"it packs buckets, which only element-wise hooks survive ({names}; no wrapper). Leave one of them out"
            )
        strategy._ddp_comm_hook = None  # or Lightning would register it on a GPU
        self._strategy = strategy

    @property
    def is_active(self) -> bool:
        """Whether the hook is registered."""
        return self._units is not None

    def register(self, controller: DGMController) -> None:
        """Register the hook on the wrapped model.

        Raises:
            ValueError: if the model has a hook already.

        """
        if self._strategy is None:
            return
        model: Any = self._strategy.model
        assert isinstance(model, DistributedDataParallel)
        if model._comm_hooks:
            raise ValueError(
                f"the model has the communication hook {model._comm_hooks[0][0].__name__} already, and DDP takes one: "
                "leave it out, or compress_gradients=False"
            )
        self._units = ActiveUnits(
            controller.masked_weights,
            lambda: controller.observing,
            wire_dtype=None if self._theirs is None else WIRE_DTYPES[self._theirs],
            group=model.process_group,
        )
        model.register_comm_hook(self._units, active_units_hook)

    def bytes_since_last(self) -> int:
        """Return the number of bytes that this rank has handed to all-reduce since the last call."""
        assert self._units is not None
        before, self._logged_bytes = self._logged_bytes, self._units.bytes
        return self._units.bytes - before

    def close(self) -> None:
        """Restore the strategy's hook; a model that is still wrapped averages whole buckets from now on."""
        if self._units is not None:
            self._units.close()
        if self._strategy is not None:
            self._strategy._ddp_comm_hook = self._theirs
            self._strategy = None
