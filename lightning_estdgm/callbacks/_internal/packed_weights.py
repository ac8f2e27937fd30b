"""Weights that are stored packed, in a Trainer: packed before there are optimizers, and what is refused."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from lightning_estdgm.callbacks._internal.extended_hook import extend_hook
from lightning_estdgm.callbacks._internal.packed_checkpoints import PackedCheckpoints
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.distributed.adapters._protocol import adapter_for
from lightning_estdgm.engine._packed_storage import PackedStorage


class PackedWeights:
    """Packing of one fit's model.

    Callbacks have no hook between the model's `configure_model` and its optimizers. So that one is extended on this
    module, and given back when it has run.

    Args:
        trainer: Trainer of the fit.
        module: its module.
        config: settings.
        total_steps: number of optimizer steps; ``None``: the Trainer's.

    Attributes:
        began: whether the run has begun; until then its failure puts the weights back as they were.

    Raises:
        ValueError: if the strategy shards weights, or sends gradients by a hook of its own.

    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, config: DGMConfig, total_steps: int | None = None
    ) -> None:
        self._check(trainer)
        plain = trainer.accumulate_grad_batches == 1 and trainer.world_size == 1 and module.automatic_optimization
        self.storage = storage = PackedStorage(config, has_one_backward=plain)
        self.began = False
        self._checkpoints: PackedCheckpoints | None = None
        self._module: Any = module

        def pack() -> None:
            storage.pack(module, lambda: total_steps or int(trainer.estimated_stepping_batches))
            self._checkpoints = PackedCheckpoints(trainer, storage.shapes)

        # Not at once: until its `setup`, other callbacks ask whether the module has a `configure_model` of its own.
        def extend_configure_model() -> None:
            self._give_back = extend_hook(module, "configure_model", pack)

        self._give_back = extend_hook(module, "setup", extend_configure_model)

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
                f"storage='packed' rebuilds DDP's buckets as parameters shrink, which loses {name}'s ddp_comm_hook: "
                "leave the hook out, or use storage='dense'"
            )

    def begin(self, trainer: pl.Trainer) -> PackedStorage:
        """Return the storage once the strategy is set up."""
        wrapper = trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            self.storage.wrappers = [wrapper]
        return self.storage

    def end(self, exception: BaseException | None = None) -> None:
        """Put the weights back as they were if the run did not begin."""
        self._give_back()
        if self.began:
            if exception is not None:
                self.storage.explain(exception)
            return
        if self._checkpoints is not None:
            self._checkpoints.end()
        self.storage.abandon()
        if exception is not None and any(parameter.is_meta for parameter in self._module.parameters()):
            self._stay_on_meta()
        if exception is not None and not _is_ours(exception):
            note = (
                "DGMCallback: with storage='packed' masked weights are parameters of shape [units, rows, columns]. "
                "Optimizers get them from named_parameters(), as layer.weight is computed from them; what needs "
                "matrices needs storage='dense'. The weights are as they were before the fit"
            )
            if hasattr(exception, "add_note"):
                exception.add_note(note)
            else:  # Python 3.10
                rank_zero_info(note)

    def _stay_on_meta(self) -> None:
        """Have the strategy's teardown leave the module where it is: what has no storage cannot be moved.

        Its error would hide the one that has ended the fit.
        """

        def cpu() -> Any:
            del vars(self._module)["cpu"]
            return self._module

        vars(self._module)["cpu"] = cpu


def _is_ours(exception: BaseException) -> bool:
    """Whether this package has raised an error: these name their own ways out."""
    frames = [frame for frame, _ in walk_tb(exception.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("lightning_estdgm.")
