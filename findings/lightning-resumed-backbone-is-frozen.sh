#!/usr/bin/env bash
# lightning 2.6.6, BackboneFinetuning, resumed from a checkpoint; with torch 2.13.0.
#
# Found: a run that goes on from a checkpoint of after the thaw never trains its backbone again. The callback freezes it in
# `setup`, also where it resumes, restores the optimizer's groups, and thaws only in the very epoch given: that one is past.
# The learning rate of the frozen group goes on as before, so logs look right. Nothing is said.
# Expected: the resumed run ends with the weights of the straight one, or says that it cannot.
# Seen: "after the checkpoint the backbone moves in the straight run: True; in the resumed one: False; learning rates: equal".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'
cd "$folder"

venv/bin/python - << 'PY' 2>log.txt || { cat log.txt; exit 1; }
import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, _):
        x, y = batch
        return (self.head(self.backbone(x)) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), 0.01)


class Rates(Callback):
    def __init__(self):
        self.seen = {}

    def on_train_epoch_start(self, trainer, module):
        self.seen[trainer.current_epoch] = [group["lr"] for group in trainer.optimizers[0].param_groups]


torch.manual_seed(1)
x = torch.randn(16, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))


def fit(folder, checkpoint=None):
    rates, net = Rates(), Net()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)
    keep = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    trainer = Trainer(max_epochs=6, accelerator="cpu", callbacks=[thaw, keep, rates], **quiet)
    trainer.fit(net, DataLoader(data, batch_size=4), ckpt_path=checkpoint)
    return net.backbone[0].weight.detach(), rates.seen


straight, rates = fit("straight")
resumed, resumed_rates = fit("resumed", "straight/epoch=2.ckpt")
saved = torch.load("straight/epoch=2.ckpt")["state_dict"]["backbone.0.weight"]
same = "equal" if all(rates[epoch] == seen for epoch, seen in resumed_rates.items()) else "different"
seen = (
    f"after the checkpoint the backbone moves in the straight run: {not torch.equal(straight, saved)}; "
    f"in the resumed one: {not torch.equal(resumed, saved)}; learning rates: {same}"
)
print(seen)
expected = (
    "after the checkpoint the backbone moves in the straight run: True; in the resumed one: False; "
    "learning rates: equal"
)
sys.exit(0 if seen == expected else f"changed; expected {expected}")
PY
