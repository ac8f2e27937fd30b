#!/usr/bin/env bash
# torch 2.13.0, torch.utils.flop_counter.FlopCounterMode; lightning 2.6.6, lightning.fabric.utilities.throughput.measure_flops.
#
# Found: of a weight in a sparse layout (COO or CSR, one number in 64 not zero) the FLOPs of one and the same product are those
# of the dense one, or none: `weight @ x` counts as if nothing were zero, torch.sparse.mm(weight, x) counts 0, and what is
# computed is never counted. aten.mm and aten.addmm have formulas by shapes, whatever the layout; aten._sparse_mm has none.
# So measure_flops, and the throughput and utilisation that Lightning makes of it, say of a sparse network either that it
# saves nothing or that it computes nothing.
# Expected: 2 * (numbers that are not zero) * columns for both, or a warning that the layout is not counted.
# Seen: "coo: @ 131072, sparse.mm 0; csr: @ 131072, sparse.mm 0; measure_flops 131072 and 0; computed 2048".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6'

"$folder/venv/bin/python" -W ignore - << 'PY'
import sys

import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch.utils.flop_counter import FlopCounterMode

dense = torch.eye(64)
x = torch.ones(64, 16)


def counted(product):
    counter = FlopCounterMode(display=False)
    with counter:
        found = product()
    assert torch.equal(found, x)
    return counter.get_total_flops()


said = []
for name, weight in (("coo", dense.to_sparse_coo()), ("csr", dense.to_sparse_csr())):
    said.append(f"{name}: @ {counted(lambda: weight @ x)}, sparse.mm {counted(lambda: torch.sparse.mm(weight, x))}")
model = torch.nn.Identity()
coo = dense.to_sparse_coo()
by_operator, by_function = (measure_flops(model, f) for f in (lambda: coo @ x, lambda: torch.sparse.mm(coo, x)))
said.append(f"measure_flops {by_operator} and {by_function}")
said.append(f"computed {2 * coo._nnz() * x.shape[1]}")
said = "; ".join(said)
print(said)
expected = "coo: @ 131072, sparse.mm 0; csr: @ 131072, sparse.mm 0; measure_flops 131072 and 0; computed 2048"
sys.exit(0 if said == expected else 1)
PY
