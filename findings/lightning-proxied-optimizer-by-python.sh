#!/usr/bin/env bash
# lightning 2.6.6 on Python >= 3.12, with torch 2.13.0.
#
# Found: an optimizer behind a proxy (a class that hands each attribute on by `__getattr__`) trains on Python 3.10 and 3.11, and is
# refused on 3.12 and later, with the message for what is no optimizer at all. Lightning asks `isinstance(it, Optimizable)`,
# a runtime-checkable protocol; since 3.12 Python looks such attributes up without `__getattr__`. Both behave as they document;
# it is the two together that turn a program that trained into one that does not.
# Expected: the same answer on every Python that lightning 2.6.6 admits, or a message that names the protocol.
# Seen, on 3.13: "has all of the protocol: True; isinstance: False; fit: MisconfigurationException". On 3.11: True, and "trained".
set -euo pipefail
python=python3  # a later one where pyenv has it: on one before 3.12 only the first half of this can be seen
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    [ -x "$found" ] && python=$found
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'

"$folder/venv/bin/python" - << 'PY' 2>/dev/null
import sys

import torch
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Proxy:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, _):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return Proxy(torch.optim.SGD(self.parameters(), 0.1))


proxy = Net().configure_optimizers()
names = ("param_groups", "defaults", "state", "step", "state_dict", "load_state_dict")
has_all = all(hasattr(proxy, name) for name in names)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
try:
    Trainer(max_steps=2, accelerator="cpu", **quiet).fit(Net(), DataLoader(TensorDataset(torch.randn(4, 2))))
    fit = "trained"
except Exception as error:
    fit = type(error).__name__
by_version, is_one = "%d.%d" % sys.version_info[:2], isinstance(proxy, Optimizable)
seen = f"has all of the protocol: {has_all}; isinstance: {is_one}; fit: {fit}"
print(f"Python {by_version}: {seen}")
after = "isinstance: False; fit: MisconfigurationException"
before = "isinstance: True; fit: trained"
expected = f"has all of the protocol: True; {after if sys.version_info >= (3, 12) else before}"
sys.exit(0 if seen == expected else f"changed; expected {expected}")
PY
