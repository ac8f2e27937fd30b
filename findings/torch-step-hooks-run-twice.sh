#!/usr/bin/env bash
# torch 2.13.0, torch.optim.
#
# Found: a step hook of an optimizer runs once or twice for one call of `step`, depending on whether an optimizer of its
# parent class was made before, anywhere in the process. `Optimizer.__init__` patches the `step` of the CLASS it makes; a
# subclass whose `step` calls `super().step()` then goes through two patched functions.
# Expected: one call of `step` runs each hook once, whatever else the process has made.
# Seen: "hooks for one step: 1 before, 2 after an SGD was made". What counts steps, or changes them, by such hooks is wrong by
# a factor of two, for a reason that lies elsewhere in the program.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6'

"$folder/venv/bin/python" - << 'PY'
import sys
import torch

class Logged(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)

def hooks_for_one_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, calls = Logged([weight], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    weight.grad = torch.ones(1)
    optimizer.step()
    return len(calls)

before = hooks_for_one_step()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
after = hooks_for_one_step()
print(f"hooks for one step: {before} before, {after} after an SGD was made")
sys.exit(0 if (before, after) == (1, 2) else 1)
PY
