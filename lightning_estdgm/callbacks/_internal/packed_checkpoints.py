"""Checkpoints of a Trainer whose model is stored packed: written and read a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_estdgm.modules._later_whole import made_later
from lightning_estdgm.plugins._direct import DirectCheckpointIO
from lightning_estdgm.plugins.checkpoint_io import SparseCheckpointIO


class PackedCheckpoints:
    """Has a Trainer save and load by layer, where its plugin is Lightning's own or `SparseCheckpointIO`.

    So it does after the fit as well, as layers stay packed: until `end`. Another plugin gets whole tensors, as it might
    read memory past torch's functions.

    Args:
        trainer: the Trainer.
        shapes: shapes of the whole weights that are stored packed.

    """

    def __init__(self, trainer: pl.Trainer, shapes: Collection[tuple[int, ...]]) -> None:
        self._trainer = trainer
        plugin: Any = trainer.strategy.checkpoint_io
        if type(plugin) is AsyncCheckpointIO:
            plugin = plugin.checkpoint_io
        self._plugin: Any = plugin
        if type(plugin) is TorchCheckpointIO:
            plugin.__class__ = DirectCheckpointIO
        if isinstance(plugin, DirectCheckpointIO):
            plugin.mapped = shapes
        if isinstance(plugin, (DirectCheckpointIO, SparseCheckpointIO)):
            _replace(trainer, "save_checkpoint", shapes)
            _replace(trainer.strategy, "load_checkpoint", shapes)

    def end(self) -> None:
        """Give the Trainer its own ways back."""
        vars(self._trainer).pop("save_checkpoint", None)
        vars(self._trainer.strategy).pop("load_checkpoint", None)
        if type(self._plugin) is DirectCheckpointIO:
            vars(self._plugin).pop("mapped", None)
            plugin: Any = self._plugin
            plugin.__class__ = TorchCheckpointIO


def _replace(owner: Any, name: str, shapes: Collection[tuple[int, ...]]) -> None:
    vars(owner).pop(name, None)  # of a fit before
    vars(owner)[name] = partial(_by_layer, getattr(owner, name), shapes)


def _by_layer(method: Callable[..., Any], shapes: Collection[tuple[int, ...]], *args: Any, **kwargs: Any) -> Any:
    with made_later(shapes):
        return method(*args, **kwargs)
