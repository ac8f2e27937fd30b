#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.state_dict.set_optimizer_state_dict.
#
# Found: a full state dict is loaded into a fresh AdamW only if its parameters have no gradients. With the gradients of an
# earlier run it raises "Expected device to be set": _init_optim_state takes any gradient for that of a stateless optimizer
# and makes no state, and the device is then looked for in that state. So lightning's second Trainer.fit(ckpt_path=...) of a
# model under ModelParallelStrategy(save_distributed_checkpoint=False) fails (lightning 2.6.6), and the first does not.
# Expected: the state is loaded, as by optimizer.load_state_dict, or an error that names the gradients.
# Seen: "with gradients: AssertionError: Expected device to be set; without: loaded 2 states".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6'

"$folder/venv/bin/python" - "$folder" << 'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
whole = StateDictOptions(full_state_dict=True)
net = torch.nn.Linear(8, 1)
first = torch.optim.AdamW(net.parameters())
net(torch.ones(2, 8)).sum().backward()
first.step()
saved = get_optimizer_state_dict(net, first, options=whole)


def loaded():
    fresh = torch.optim.AdamW(net.parameters())
    try:
        set_optimizer_state_dict(net, fresh, optim_state_dict=saved, options=whole)
    except AssertionError as error:
        return f"AssertionError: {error}"
    return f"loaded {len(fresh.state)} states"


kept = loaded()
net.zero_grad()
cleared = loaded()
dist.destroy_process_group()
print(f"with gradients: {kept}; without: {cleared}")
sys.exit(0 if kept == "AssertionError: Expected device to be set" and cleared == "loaded 2 states" else 1)
PY
