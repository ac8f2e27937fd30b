#!/usr/bin/env bash
# carbontracker 2.4.7 with nvidia-ml-py 13.615.71, on two NVIDIA GPUs of a stand-in for NVML's C library, compiled here.
#
# Found: a job with CUDA_VISIBLE_DEVICES="", which hides all GPUs from it, is charged with the power of all GPUs of the machine.
# So is one whose GPU is given by UUID, as schedulers do, with the power of its neighbours. What is no list of numbers is taken
# for "not set", in silence.
# Expected: no GPU for the first, one for the second, or an error.
# Seen: "1: 100 W; empty: 200 W; UUID: 200 W" (each GPU draws 100 W).
set -euo pipefail
command -v cc > /dev/null || { echo "needs a C compiler"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'carbontracker==2.4.7' 'nvidia-ml-py==13.615.71'
cd "$folder"

cat > nvml.c << 'C'
#include <stdio.h>
typedef unsigned int uint;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(uint flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(uint *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(uint index, void **handle) { *handle = (void *)(long)(index + 1); return index > 1 ? 2 : 0; }
int nvmlDeviceGetName(void *h, char *name, uint size) { (void)h; snprintf(name, size, "Stand-in"); return 0; }
int nvmlDeviceGetPowerUsage(void *h, uint *milliwatts) { (void)h; *milliwatts = 100000; return 0; }
C
cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c

cat > power.py << 'PY'
from carbontracker.components.gpu.nvidia import NvidiaGPU

gpus = NvidiaGPU(pids=[], devices_by_pid=False)  # as CarbonTracker makes it by default
gpus.init()
print(f"{sum(gpus.power_usage()):.0f} W")
PY
export LD_LIBRARY_PATH=$folder
one=$(CUDA_VISIBLE_DEVICES=1 venv/bin/python power.py)
none=$(CUDA_VISIBLE_DEVICES="" venv/bin/python power.py)
uuid=$(CUDA_VISIBLE_DEVICES=GPU-10000000-1111-2222-3333-444444444444 venv/bin/python power.py)
seen="1: $one; empty: $none; UUID: $uuid"
echo "$seen"
[ "$seen" = "1: 100 W; empty: 200 W; UUID: 200 W" ] || { echo "changed"; exit 1; }
