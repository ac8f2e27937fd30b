#!/usr/bin/env bash
# lightning 2.6.6, Trainer.fit(ckpt_path=...).
#
# Found: a fit that is stopped in mid-epoch (EarlyStopping at a validation in mid-epoch, should_stop) counts that epoch as done.
# A checkpoint saved after that fit and one saved by ModelCheckpoint at the same step hold the same weights, but a run
# resumed from the former skips the rest of the epoch: of 4 epochs of 20 batches it trains 65 steps, from the latter all 80.
# Expected: both go on with the next batch, as the same number of steps is done.
# Seen: "stopped after 25 steps; resumed to 65 from the checkpoint after the fit, to 80 from that of the same step".
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
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def validation_step(self, batch):
        self.log("worse", float(self.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(n):
    return torch.utils.data.DataLoader(torch.ones(n, 4), batch_size=1)


def trainer(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=4, val_check_interval=5, callbacks=[*callbacks], num_sanity_val_steps=0, **quiet)


keep = ModelCheckpoint("kept", filename="{step}", save_top_k=-1, every_n_train_steps=25)
first = trainer(keep, EarlyStopping("worse", patience=4))
first.fit(Net(), batches(20), batches(2))
first.save_checkpoint("after.ckpt")


def resumed(path):
    second = trainer()
    second.fit(Net(), batches(20), batches(2), ckpt_path=path)
    return second.global_step


ends = resumed("after.ckpt"), resumed("kept/step=25.ckpt")
print(
    f"stopped after {first.global_step} steps; resumed to {ends[0]} from the checkpoint after the fit, to {ends[1]} "
    "from that of the same step"
)
sys.exit(0 if (first.global_step, *ends) == (25, 65, 80) else 1)
PY
