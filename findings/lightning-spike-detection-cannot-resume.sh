#!/usr/bin/env bash
# lightning 2.6.6, SpikeDetection; with torch 2.13.0 and torchmetrics 1.9.0.
#
# Found: no checkpoint of a run with SpikeDetection can be resumed by a run with it. The callback saves its running mean from
# `self.running_mean`, and restores it into `self.running`, which does not exist.
# Found besides: `finite_only` does the opposite of what is documented. By True, the default, a loss of NaN is a spike and ends
# the run; by False it is none.
# Expected: a run that goes on; and NaN ends it by False, as documented.
# Seen: "resumed: AttributeError, no attribute 'running'; NaN by finite_only=True: spike, by False: none".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6' 'torchmetrics==1.9.0'
cd "$folder"

venv/bin/python - << 'PY' 2>log.txt || { cat log.txt; exit 1; }
import sys

import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import SpikeDetection
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, bad_step=-1):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.bad_step = bad_step

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        return loss * float("nan") if index == self.bad_step else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(net, steps, checkpoint=None, **settings):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    watch = SpikeDetection(exclude_batches_path="./skip.json", rtol=1e6, **settings)
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[watch], **quiet)
    trainer.fit(net, DataLoader(TensorDataset(torch.ones(64, 2)), batch_size=4), ckpt_path=checkpoint)
    return trainer


fit(Net(), 4).save_checkpoint("four.ckpt")
try:
    fit(Net(), 8, "four.ckpt")
    resumed = "went on"
except AttributeError as error:
    resumed = f"AttributeError, no attribute {error.name!r}"


def of_nan(finite_only):
    try:
        fit(Net(bad_step=4), 8, finite_only=finite_only)
    except TrainingSpikeException:
        return "spike"
    return "none"


seen = f"resumed: {resumed}; NaN by finite_only=True: {of_nan(True)}, by False: {of_nan(False)}"
print(seen)
expected = "resumed: AttributeError, no attribute 'running'; NaN by finite_only=True: spike, by False: none"
sys.exit(0 if seen == expected else f"changed; expected {expected}")
PY
