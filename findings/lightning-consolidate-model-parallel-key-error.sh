#!/usr/bin/env bash
# lightning 2.6.6, the Trainer's `consolidate_checkpoint` on a sharded checkpoint of ModelParallelStrategy (FSDP2).
#
# Found: it ends in a KeyError, and writes nothing. The strategy saves the weights by the name `state_dict`; the tool renames `model`,
# the name of FSDPStrategy (FSDP1). The checkpoint itself is whole: torch's own `dcp_to_torch_save` makes one file of it, with
# the weights and the optimizer's state.
# Expected: one file. The tool's help speaks of FSDP's sharded checkpoints, and this one's weights are sharded by `fully_shard`.
# Seen: "consolidate: rc 1, KeyError: 'model', files 0; dcp_to_torch_save: ['optimizer_0', 'state_dict']".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'

cd "$folder"
"$folder/venv/bin/python" - << 'PY'
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Net(LightningModule):
    def configure_model(self):
        self.layer = torch.nn.Linear(4, 1)
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


trainer = Trainer(
    max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
    strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo"),
)
trainer.fit(Net(), DataLoader(torch.ones(8, 4), 4))
trainer.save_checkpoint("saved.ckpt")
before = set(Path().iterdir())
call = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", "saved.ckpt"]
done = subprocess.run(call, capture_output=True, text=True)
files = len(set(Path().iterdir()) - before)
dcp_to_torch_save("saved.ckpt", "whole.ckpt")
whole = sorted(torch.load("whole.ckpt", weights_only=True))
seen = f"consolidate: rc {done.returncode}, {done.stderr.splitlines()[-1]}, files {files}; dcp_to_torch_save: {whole}"
print(seen)
sys.exit(seen != "consolidate: rc 1, KeyError: 'model', files 0; dcp_to_torch_save: ['optimizer_0', 'state_dict']")
PY
