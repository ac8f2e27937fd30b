"""`DirectCheckpointIO`: Lightning's own plugin and files, without the whole checkpoint in memory."""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from lightning_estdgm.engine._freed_memory import mapped_allocations
from lightning_estdgm.plugins._sparse_file import write_ordinary


class DirectCheckpointIO(TorchCheckpointIO):
    """Write each tensor to the file as it is made, and map the large ones of a local file instead of reading them.

    Lightning's plugin holds the file in memory until it is complete. This one writes it under another name first, so
    that it is whole or not there either.

    Attributes:
        mapped: shapes of tensors that stay in the file: of those that are copied once they are loaded. All others are
            read at once.

    """

    mapped: Collection[tuple[int, ...]] = ()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint as Lightning's own plugin does.

        Raises:
            OSError: if it cannot be written. What was there under `path` is left as it was.

        """
        if storage_options is not None:
            raise TypeError(f"TorchCheckpointIO takes no storage_options, got {storage_options!r}")
        with mapped_allocations():
            write_ordinary(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint as Lightning's own plugin does."""
        if not (self.mapped and os.path.isfile(path) and zipfile.is_zipfile(path)):
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only, mmap=True)
        return self._read(checkpoint, {})

    def _read(self, node: Any, memo: dict[int, Any]) -> Any:
        """Read tensors of other shapes from the file, in place in dicts and lists."""
        if isinstance(node, Tensor):
            return node if tuple(node.shape) in self.mapped else copy.deepcopy(node, memo)
        if isinstance(node, dict):
            node.update({key: self._read(value, memo) for key, value in node.items()})
        elif isinstance(node, list):
            node[:] = [self._read(value, memo) for value in node]
        elif type(node) is tuple:
            return tuple(self._read(value, memo) for value in node)
        return node
