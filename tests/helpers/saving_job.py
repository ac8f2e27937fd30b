"""Train packed for three steps and save, in a process of its own: prints its bytes at the most before saving and after.

Run with the plugin's name, the folder to save to, and when to save.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from lightning_estdgm import DGMCallback, DGMConfig, SparseCheckpointIO, Units
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.tools._quiet import QUIET_TRAINER
from lightning_estdgm.tools.bench._peak_memory import peak_resident

WIDTH, LAYERS, STEPS = 1024, 24, 3
DENSE_STATE = 12 * LAYERS * WIDTH**2
"""Bytes of the dense network's weights and moments."""


class Own(TorchCheckpointIO):
    """A plugin of the user's own."""


PLUGINS = {"none": list, "own": lambda: [Own()], "async": lambda: [AsyncCheckpointIO()]}
PLUGINS["sparse"] = lambda: [SparseCheckpointIO()]


class Deep(pl.LightningModule):
    """A perceptron of `LAYERS` square layers, without biases."""

    def __init__(self, width=WIDTH, layers=LAYERS):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(plugin, *callbacks, ckpt=None, steps=STEPS, width=WIDTH, layers=LAYERS):
    """Return the Trainer after a fit of a model that was never there as a whole."""
    schedule = ConstantDensity(0.1, update_every=100, observe_steps=1)
    settings = DGMConfig(schedule, units=Units(size=16), storage="packed")
    pl.seed_everything(0, verbose=False)
    with torch.device("meta"):
        module = Deep(width, layers)
    trainer = pl.Trainer(
        **QUIET_TRAINER | {"accelerator": "cpu"},
        max_steps=steps,
        logger=False,
        callbacks=[DGMCallback(settings), *callbacks],
        plugins=PLUGINS[plugin](),
    )
    trainer.fit(module, DataLoader(torch.ones(8 * steps, width), batch_size=8), ckpt_path=ckpt)
    return trainer


class Save(pl.Callback):
    """Saves at the end of training, and notes the most bytes that the process has had before and after."""

    def __init__(self, folder):
        self.path, self.seen = Path(folder) / "last.ckpt", ()

    def save(self, trainer):
        before = peak_resident()
        trainer.save_checkpoint(self.path)
        trainer.strategy.checkpoint_io.teardown()  # which waits for a plugin in the background
        self.seen = before, peak_resident()

    def on_train_end(self, trainer, pl_module):
        if pl_module.saves_inside:
            self.save(trainer)


def main(plugin, folder, when):
    Deep.saves_inside = when == "inside"
    save = Save(folder)
    trainer = fit(plugin, save)
    if when == "after":
        save.save(trainer)
    print(*save.seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
