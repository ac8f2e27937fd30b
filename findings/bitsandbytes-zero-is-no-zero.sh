#!/usr/bin/env bash
# bitsandbytes 0.50.2, its CPU library, functional.quantize_blockwise.
#
# Found: on a CPU, 0.0 is not quantised to 0.0. The code book has 0 (code 127 of the signed map), but 0.0 gets code 131, which is
# 2.125e-5 of the block's largest magnitude. So 8-bit optimizers on a CPU move weights whose gradient is 0 in every step.
# Expected: the nearest entry of the code book, which for 0.0 is 0.0 itself, whatever else is in the block.
# Seen: "0.0 is stored with code 131 and read as 2.125e-05; the code of 0 is 127".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'bitsandbytes==0.50.2'

"$folder/venv/bin/python" - << 'PY'
import sys
import torch
import bitsandbytes.functional as F

values = torch.tensor([0.0, 1.0, -1.0, 0.5] * 64)
codes, state = F.quantize_blockwise(values)
read = float(F.dequantize_blockwise(codes, state)[0])
zero = int((F.create_dynamic_map(signed=True) == 0).nonzero())
print(f"0.0 is stored with code {int(codes[0])} and read as {read:.4g}; the code of 0 is {zero}")
sys.exit(0 if int(codes[0]) != zero else 1)
PY
