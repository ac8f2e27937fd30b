#!/usr/bin/env bash
# lightning 2.6.6, manual optimization with `self.optimizers(use_pl_optimizer=False)`.
#
# Found: no step of such an optimizer is counted. `trainer.global_step` stays 0, `max_steps` never ends the run, and
# ModelCheckpoint(every_n_train_steps=...) saves nothing. The loggers' steps go on, as they count batches. Nothing is said.
# Expected: as with Lightning's own wrapper, which the documentation describes as being there for toggling and profiling.
# Seen: "wrapped: 3 batches, global_step 3, 1 checkpoint, last logged step 2; plain: 20 batches, global_step 0, 0 checkpoints,
# last logged step 19", of max_steps=3, max_epochs=2 and 10 batches an epoch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'
cd "$folder"

venv/bin/python - << 'PY' 2>log.txt || { cat log.txt; exit 1; }
import csv
import logging
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    automatic_optimization = False

    def __init__(self, wrapped):
        super().__init__()
        self.layer, self.wrapped, self.batches = torch.nn.Linear(4, 1), wrapped, 0

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizer.zero_grad()
        loss = self.layer(batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        self.batches += 1
        self.log("loss", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


seen = []
for name, wrapped in (("wrapped", True), ("plain", False)):
    model, keeps = Model(wrapped), ModelCheckpoint(name, every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        max_steps=3, max_epochs=2, callbacks=[keeps], logger=CSVLogger(".", name="logs", version=name), log_every_n_steps=1,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.randn(10, 4)))
    files = len(list(Path(name).glob("*.ckpt")))
    with open(f"logs/{name}/metrics.csv") as file:
        last = max(int(row["step"]) for row in csv.DictReader(file))
    seen.append(
        f"{name}: {model.batches} batches, global_step {trainer.global_step}, {files} checkpoint{'s' * (files != 1)}, "
        f"last logged step {last}"
    )
print("; ".join(seen))
expected = (
    "wrapped: 3 batches, global_step 3, 1 checkpoint, last logged step 2; "
    "plain: 20 batches, global_step 0, 0 checkpoints, last logged step 19"
)
sys.exit(0 if "; ".join(seen) == expected else f"changed; expected {expected}")
PY
