#!/usr/bin/env bash
# lightning 2.6.6, a BatchSizeFinder that searches at the start of a later epoch, as the class's own documentation shows.
#
# Found: the epoch at whose start the size is found trains on one batch and ends: of 64 samples it sees 16. The epochs after it are whole.
# At the start of epoch 0 nothing is lost. (That the trials of a later epoch run no step either is known: Lightning's issue 21903.)
# Expected: 4 batches of 16 in the epoch of the search, as in those after it.
# Seen: "samples by epoch, searched in 0: [64, 64, 64, 64], in 1: [64, 16, 64, 64], in 2: [64, 64, 16, 64]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'

cd "$folder"
"$folder/venv/bin/python" - << 'PY'
import logging
import sys
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Later(BatchSizeFinder):
    def __init__(self, epoch):
        super().__init__(steps_per_trial=2, init_val=4, max_trials=3)
        self.epoch, self.searching = epoch, False

    def on_fit_start(self, trainer, module):
        pass

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            self.searching = True
            self.scale_batch_size(trainer, module)
            self.searching = False


class Net(LightningModule):
    def __init__(self, finder):
        super().__init__()
        self.layer, self.batch_size = torch.nn.Linear(4, 1), 4
        self.finder, self.samples = finder, [0, 0, 0, 0]

    def training_step(self, batch):
        if not self.finder.searching:
            self.samples[self.trainer.current_epoch] += len(batch)
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 4), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def samples(epoch):
    finder = Later(epoch)
    net = Net(finder)
    trainer = Trainer(
        max_epochs=4, callbacks=[finder], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(net)
    return net.samples


seen = f"samples by epoch, searched in 0: {samples(0)}, in 1: {samples(1)}, in 2: {samples(2)}"
print(seen)
sys.exit(seen != "samples by epoch, searched in 0: [64, 64, 64, 64], in 1: [64, 16, 64, 64], in 2: [64, 64, 16, 64]")
PY
