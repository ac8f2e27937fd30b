#!/usr/bin/env bash
# torch 2.13.0, torch.optim.LBFGS, copy.deepcopy.
#
# Found: a deep copy of an L-BFGS optimizer raises in its first step. Optimizer.__getstate__ keeps defaults, state and
# param_groups alone, and LBFGS keeps its parameters in an attribute of its own, which the copy lacks. AdamW's copy steps.
# Expected: a copy that steps as the original does, or an error from copy.deepcopy.
# Seen: "LBFGS: AttributeError: 'LBFGS' object has no attribute '_params'; AdamW: stepped".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6'

"$folder/venv/bin/python" - << 'PY'
import copy
import sys

import torch


def step_of_a_copy(cls):
    parameter = torch.nn.Parameter(torch.ones(3))
    copied = copy.deepcopy(cls([parameter], lr=0.1))
    own = copied.param_groups[0]["params"][0]

    def closure():
        copied.zero_grad()
        loss = own.square().sum()
        loss.backward()
        return loss

    try:
        copied.step(closure)
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "stepped"


seen = {cls.__name__: step_of_a_copy(cls) for cls in (torch.optim.LBFGS, torch.optim.AdamW)}
print("; ".join(f"{name}: {what}" for name, what in seen.items()))
sys.exit(0 if seen["LBFGS"].startswith("AttributeError") and seen["AdamW"] == "stepped" else 1)
PY
