#!/usr/bin/env bash
# pytorch-optimizer 3.10.0, Lion(cautious=True).
#
# Found: cautious=True divides what is left of a step by the share of all entries that agree with the gradient. Entries whose
# gradient is zero count as disagreeing. So a row of an embedding steps further the fewer rows a batch reads: with 10 of 1,000
# rows, an entry whose gradient agrees moves by 99 times the learning rate. Lion's steps are the learning rate exactly.
# Weights that are masked, or modality branches without samples in a batch, have the same effect on the rest of their tensor.
# Expected: entries without gradient are left out of the share, so that a row's step is that of an embedding of these rows.
# Seen: "rows read 1000 of 1000: 1.0 lr; 100: 10.0 lr; 10: 98.8 lr; without cautious, 10: 1.0 lr".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'pytorch-optimizer==3.10.0'

"$folder/venv/bin/python" - << 'PY'
import sys

import torch
from pytorch_optimizer import Lion


def furthest(rows: int, cautious: bool) -> float:
    """Largest step of an entry in learning rates, where the first `rows` of 1,000 rows are read."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(1000, 8)
    optimizer = Lion(table.parameters(), lr=1e-3, cautious=cautious)
    before = table.weight.detach().clone()
    table(torch.arange(rows)).sum().backward()
    optimizer.step()
    return round(float((table.weight.detach() - before).abs().max()) / 1e-3, 1)


steps = [furthest(rows, True) for rows in (1000, 100, 10)]
plain = furthest(10, False)
print(f"rows read 1000 of 1000: {steps[0]} lr; 100: {steps[1]} lr; 10: {steps[2]} lr; without cautious, 10: {plain} lr")
sys.exit(0 if steps == [1.0, 10.0, 98.8] and plain == 1.0 else 1)
PY
