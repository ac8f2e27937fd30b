"""Weights that are stored packed, in a Trainer: packed before there are optimizers, and what is refused."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.nn.parallel import DistributedDataParallel

from lightning_estdgm.distributed.adapters._protocol import adapter_for
from lightning_estdgm.engine._storage import PackedStorage

_HOOK = "configure_model"


class PackedWeights:
    """Packing of one fit's model.

    Lightning has no hook of callbacks between the model's `configure_model` and its optimizers. So that hook is
    extended on the one module, and given back when it has run.

    Args:
        trainer: Trainer of the fit.
        module: its module.
        storage: storage that packs.
        total_steps: number of optimizer steps; ``None``: the Trainer's.

    Raises:
        ValueError: if the strategy shards weights, or sends gradients by a hook of its own.

    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, storage: PackedStorage, total_steps: int | None = None
    ) -> None:
        self._check(trainer)
        self.storage = storage
        self._began = False
        self._module: Any = module
        self._own = vars(module).get(_HOOK)
        configure = module.configure_model

        def configure_model() -> None:
            self._give_back()
            configure()
            storage.pack(module, lambda: total_steps or int(trainer.estimated_stepping_batches))

        self._extended = vars(module)[_HOOK] = configure_model

    @staticmethod
    def _check(trainer: pl.Trainer) -> None:
        strategy: Any = trainer.strategy
        name = type(strategy).__name__
        if adapter_for(strategy).name != "base":
            raise ValueError(
                f"storage='packed' works on one device and with DDP, got {name}: use storage='dense', which it shards"
            )
        if getattr(strategy, "_ddp_comm_hook", None) is not None:
            raise ValueError(
                f"storage='packed' rebuilds DDP's buckets as parameters shrink, which loses the ddp_comm_hook of {name}: "
                "leave the hook out, or use storage='dense'"
            )

    def begin(self, trainer: pl.Trainer) -> PackedStorage:
        """Return the storage once the strategy is set up."""
        self._began = True
        wrapper = trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            self.storage.wrappers = [wrapper]
        return self.storage

    def end(self, exception: BaseException | None = None) -> None:
        """Put the weights back as they were if the run did not begin."""
        self._give_back()
        if self._began:
            return
        self.storage.abandon()
        if exception is not None and hasattr(exception, "add_note"):
            exception.add_note(
                "DGMCallback: with storage='packed' masked weights are parameters of shape [units, rows, columns]; what "
                "needs matrices needs storage='dense'. The weights are as they were before the fit"
            )

    def _give_back(self) -> None:
        if vars(self._module).get(_HOOK) is self._extended:
            del vars(self._module)[_HOOK]
            if self._own is not None:
                vars(self._module)[_HOOK] = self._own
