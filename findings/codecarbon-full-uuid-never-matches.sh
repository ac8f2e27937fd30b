#!/usr/bin/env bash
# codecarbon 3.3.2 with nvidia-ml-py 13.615.71, on two NVIDIA GPUs of a stand-in for NVML's C library, which this script compiles.
#
# Found: with a GPU's UUID in CUDA_VISIBLE_DEVICES, or in `gpu_ids`, CodeCarbon follows no GPU and reports 0 J for them. It takes a
# "MIG-" off the front by `lstrip`, which takes off each of the letters M, I, G and "-": "GPU-..." becomes "PU-...", which no UUID
# begins with. So it fails for the UUID as nvidia-smi prints it, and as schedulers set it.
# Expected: that GPU's joules, as its own comment says, or an error. A log line at level warning is all there is.
# Seen: "by index: more than 0 J; by UUID: 0 J".
set -euo pipefail
command -v cc > /dev/null || { echo "needs a C compiler"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'codecarbon==3.3.2' 'nvidia-ml-py==13.615.71'
cd "$folder"

cat > nvml.c << 'C'
/* Two GPUs that draw 100 W each. */
#include <stdio.h>
#include <string.h>
#include <time.h>
typedef unsigned int uint;
static long device(void *handle) { return (long)handle - 1; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(uint flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(uint *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(uint index, void **handle) { *handle = (void *)(long)(index + 1); return index > 1 ? 2 : 0; }
int nvmlDeviceGetName(void *h, char *name, uint size) { (void)h; snprintf(name, size, "Stand-in"); return 0; }
int nvmlDeviceGetUUID(void *h, char *uuid, uint size) {
    snprintf(uuid, size, "GPU-%ld0000000-1111-2222-3333-444444444444", device(h));
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *millijoules) {
    struct timespec now;
    (void)h;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = 100000ull * now.tv_sec + now.tv_nsec / 10000;
    return 0;
}
int nvmlDeviceGetPowerUsage(void *h, uint *milliwatts) { (void)h; *milliwatts = 100000; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *h, uint *milliwatts) { (void)h; *milliwatts = 300000; return 0; }
int nvmlDeviceGetTemperature(void *h, int sensor, uint *celsius) { (void)h, (void)sensor; *celsius = 50; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *bytes) { (void)h; memset(bytes, 0, 24); return 0; }
int nvmlDeviceGetUtilizationRates(void *h, uint *per_cent) { (void)h; per_cent[0] = per_cent[1] = 50; return 0; }
int nvmlDeviceGetComputeMode(void *h, int *mode) { (void)h; *mode = 0; return 0; }
C
cc -shared -fPIC -o libnvidia-ml.so.1 nvml.c
printf '#!/bin/sh\nexit 0\n' > nvidia-smi && chmod +x nvidia-smi  # asked whether there are GPUs

cat > measure.py << 'PY'
import logging
import time

from codecarbon import OfflineEmissionsTracker

logging.disable(logging.CRITICAL)
tracker = OfflineEmissionsTracker(
    country_iso_code="FRA", save_to_file=False, force_cpu_power=1, force_ram_power=1, allow_multiple_runs=True
)
tracker.start()
time.sleep(1)
tracker.stop()
joules = tracker.final_emissions_data.gpu_energy * 3.6e6
print("more than 0 J" if joules > 0 else "0 J" if joules == 0 else joules)
PY
export LD_LIBRARY_PATH=$folder PATH=$folder:$PATH HOME=$folder
by_index=$(CUDA_VISIBLE_DEVICES=1 venv/bin/python measure.py)
by_uuid=$(CUDA_VISIBLE_DEVICES=GPU-10000000-1111-2222-3333-444444444444 venv/bin/python measure.py)
seen="by index: $by_index; by UUID: $by_uuid"
echo "$seen"
[ "$seen" = "by index: more than 0 J; by UUID: 0 J" ] || { echo "changed"; exit 1; }
