/* A stand-in for libnvidia-ml.so.1, with the real signatures, scripted by the text file that FAKE_NVML names.
 *
 * The file is read anew at every call, so a test changes the machine by rewriting it:
 *   init CODE
 *   gpu UUID HANDLE_CODE ENERGY_CODE ENERGY_MJ INSTANT_CODE INSTANT_MW USAGE_CODE USAGE_MW WATTS PCI MIG_MODE NAME
 *   mig UUID PARENT_INDEX
 * The counter is ENERGY_MJ plus WATTS times the monotonic clock, so it runs by itself unless WATTS is 0.
 * It answers "uninitialized" (1) after as many shutdowns as initialisations, and "unknown error" (999) in a forked
 * child that did not initialise it, and crashes when given a null handle.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX 64
typedef struct {
    char uuid[96], pci[32], name[96];
    int handle, energy, instant, usage, parent, mig;
    unsigned long long mj;
    unsigned mw, avg, watts;
} Gpu;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, pci_device, subsystem;
    char bus_id[32];
} Pci;
typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned int valueType, nvmlReturn;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; int si; unsigned short us; } value;
} Field;

static Gpu gpus[MAX], migs[MAX];
static int n_gpus, n_migs, init_code, users;
static pid_t owner;
static int gpu_tag[MAX], mig_tag[MAX]; /* a handle is an address in here */

static void load(void) {
    char line[512];
    const char *path = getenv("FAKE_NVML");
    FILE *f = path ? fopen(path, "r") : NULL;
    n_gpus = n_migs = 0;
    init_code = 9; /* no script: no driver */
    if (!f) return;
    init_code = 0;
    while (fgets(line, sizeof line, f)) {
        Gpu g;
        memset(&g, 0, sizeof g);
        if (sscanf(line, "init %d", &init_code) == 1) continue;
        if (sscanf(line, "gpu %95s %d %d %llu %d %u %d %u %u %31s %d %95[^\n]", g.uuid, &g.handle, &g.energy, &g.mj,
                   &g.instant, &g.mw, &g.usage, &g.avg, &g.watts, g.pci, &g.mig, g.name) == 12 && n_gpus < MAX)
            gpus[n_gpus++] = g;
        else if (sscanf(line, "mig %95s %d", g.uuid, &g.parent) == 2 && n_migs < MAX)
            migs[n_migs++] = g;
    }
    fclose(f);
}

#define READY do { load(); if (!owner) return 1; if (owner != getpid()) return 999; } while (0)

static int find(void *handle, Gpu **gpu) {
    long i = (int *)handle - gpu_tag;
    *(volatile int *)handle; /* the real library crashes on a null handle too */
    if (i < 0 || i >= n_gpus) return 2;
    *gpu = &gpus[i];
    return gpus[i].handle == 15 ? 15 : 0; /* a lost GPU answers nothing, whoever holds a handle of it */
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    load();
    if (init_code) return init_code;
    users = owner == getpid() ? users + 1 : 1;
    owner = getpid();
    return 0;
}

int nvmlShutdown(void) {
    if (owner != getpid()) return 1;
    if (--users == 0) owner = 0;
    return 0;
}

const char *nvmlErrorString(int code) { (void)code; return "fake error"; }
int nvmlDeviceGetCount_v2(unsigned *n) { READY; *n = n_gpus; return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
    READY;
    if ((int)i >= n_gpus) return 2;
    *h = &gpu_tag[i];
    return gpus[i].handle;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **h) {
    READY;
    for (int i = 0; i < n_gpus; i++)
        if (!strcmp(gpus[i].uuid, uuid)) { *h = &gpu_tag[i]; return gpus[i].handle; }
    for (int i = 0; i < n_migs; i++)
        if (!strcmp(migs[i].uuid, uuid)) { *h = &mig_tag[i]; return 0; }
    return 6;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *mig, void **h) {
    READY;
    long i = (int *)mig - mig_tag;
    if (i < 0 || i >= n_migs) return 2;
    *h = &gpu_tag[migs[i].parent];
    return 0;
}

int nvmlDeviceGetUUID(void *h, char *out, unsigned n) {
    Gpu *g; READY;
    long m = (int *)h - mig_tag;
    int rc = m >= 0 && m < n_migs ? (g = &migs[m], 0) : find(h, &g);
    if (rc) return rc;
    snprintf(out, n, "%s", g->uuid);
    return 0;
}

int nvmlDeviceGetName(void *h, char *out, unsigned n) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    snprintf(out, n, "%s", g->name);
    return 0;
}

int nvmlSystemGetDriverVersion(char *out, unsigned n) { READY; snprintf(out, n, "999.1"); return 0; }

int nvmlDeviceGetPciInfo_v3(void *h, Pci *out) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "%s", g->pci);
    return 0;
}

int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *current = *pending = g->mig > 0;
    return g->mig < 0 ? 3 : 0; /* -1: a GPU that has no MIG */
}

/* What other meters ask for. */
int nvmlDeviceGetArchitecture(void *h, unsigned *arch) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *arch = 9;
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *total_free_used) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    total_free_used[0] = total_free_used[1] = 1ull << 30;
    total_free_used[2] = 0;
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *h, unsigned *gpu_memory) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    gpu_memory[0] = gpu_memory[1] = 50;
    return 0;
}

int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *celsius) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    (void)sensor;
    *celsius = 40;
    return 0;
}

int nvmlDeviceGetComputeMode(void *h, unsigned *mode) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *mode = 0;
    return 0;
}

static int no_processes(void *h, unsigned *count) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *count = 0;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, void *out) { (void)out; return no_processes(h, count); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *count, void *out) { (void)out; return no_processes(h, count); }

int nvmlDeviceGetC2cModeInfoV1(void *h, unsigned *enabled) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    (void)enabled;
    return 3;
}

int nvmlDeviceGetEnforcedPowerLimit(void *h, unsigned *mw) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *mw = 700000;
    return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *mj = g->mj + g->watts * (now.tv_sec * 1000ull + now.tv_nsec / 1000000);
    return g->energy;
}

int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    *mw = g->avg;
    return g->usage;
}

int nvmlDeviceGetFieldValues(void *h, int n, Field *v) {
    Gpu *g; READY; int rc = find(h, &g); if (rc) return rc;
    for (int i = 0; i < n; i++) {
        v[i].nvmlReturn = v[i].fieldId == 186 && v[i].scopeId == 0 ? (unsigned)g->instant : 3;
        v[i].value.ui = g->mw;
    }
    return 0;
}
