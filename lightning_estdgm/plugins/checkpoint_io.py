"""`SparseCheckpointIO`: checkpoints without the zeros of inactive weights, written whole or not at all, and verified.

`sparse_file` says what such a file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_estdgm.engine._freed_memory import mapped_allocations
from lightning_estdgm.plugins._packing import pack, unpack
from lightning_estdgm.plugins._sparse_file import is_sparse_content, read_sparse, write_sparse

_BYPASSING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class SparseCheckpointIO(CheckpointIO):
    """Save checkpoints without the zeros of inactive weights, and load them back to the bit.

    Weights and optimizer state of masked layers are stored as active values; the masks are those that `DGMCallback` has
    saved in the same checkpoint. Each tensor is checked: one that holds anything where its mask is inactive is stored
    dense. Loading gives the checkpoint that Lightning's own plugin would have given. A file is complete under its name
    or not there: it is written to a temporary file in the same folder, synced, and renamed. Its SHA-256 is verified
    before anything is loaded.

    Ordinary checkpoints are loaded too. For asynchronous saving wrap it: ``AsyncCheckpointIO(SparseCheckpointIO())``.
    ``load_from_checkpoint`` and strategies that load past the plugin need `densify_checkpoint` first.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[SparseCheckpointIO()], logger=False, accelerator="cpu")

    """

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a strategy that would save through this plugin and then not load through it.

        Raises:
            ValueError: for DeepSpeed, FSDP and FSDP2 (`ModelParallelStrategy`).

        """
        if isinstance(strategy, _BYPASSING):
            raise ValueError(
                f"{type(strategy).__name__} loads checkpoints past its CheckpointIO, so it could not read what "
                "SparseCheckpointIO saves: leave the plugin out, or use a strategy that keeps whole weights on each "
                "rank, such as 'ddp'"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: checkpoint as Lightning makes it.
            path: local, or any URL that fsspec can write.
            storage_options: must be ``None``, as for Lightning's own plugin.

        Raises:
            OSError: if it cannot be written (such as on a full disk). What was there under `path` is left as it was.

        """
        if storage_options is not None:
            raise TypeError(f"SparseCheckpointIO takes no storage_options, got {storage_options!r}")
        with mapped_allocations():
            write_sparse(pack(checkpoint), path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint that this plugin or Lightning's own has saved.

        Args:
            path: local, or any URL that fsspec can read.
            map_location: as for ``torch.load``.
            weights_only: as for ``torch.load``; ``None`` means True.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated or altered.

        """
        weights_only = True if weights_only is None else weights_only
        if (content := read_sparse(path, map_location, weights_only)) is not None:
            return unpack(content)
        checkpoint = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
        if is_sparse_content(checkpoint):
            raise ValueError(f"sparse checkpoint {path} is damaged: the checksum at its end is cut off or altered")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; does nothing if there is none."""
        TorchCheckpointIO().remove_checkpoint(path)
