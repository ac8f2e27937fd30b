/* A stand-in for libamd_smi.so and librocm_smi64.so, with the real signatures, scripted by the text file that FAKE_AMD
 * names. The file is read anew at every call:
 *   init CODE
 *   gpu PCI ENERGY_CODE TICKS WATTS POWER_CODE CURRENT_W AVERAGE_W HIP_ID UNIQUE_ID NAME
 * Codes are the library's own. The accumulator is TICKS plus WATTS times the monotonic clock, in units of 2^-16 J.
 * An ENERGY_CODE of "not found" (amdsmi 31, ROCm-SMI 10) is a lost GPU, which answers nothing.
 * The tests add a stub, "not supported", for every other function that the real amdsmi package looks up.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX 16
typedef struct {
    char pci[32], unique[32], name[96];
    int energy, power, hip;
    unsigned long long ticks, watts, current, average;
} Gpu;

static Gpu gpus[MAX];
static int n_gpus, init_code;
static pid_t owner;
static int tag[MAX], socket_tag; /* a handle is an address in here */

static void load(void) {
    char line[512];
    const char *path = getenv("FAKE_AMD");
    FILE *f = path ? fopen(path, "r") : NULL;
    n_gpus = 0;
    init_code = 34; /* no script: no driver */
    if (!f) return;
    init_code = 0;
    while (fgets(line, sizeof line, f)) {
        Gpu g;
        memset(&g, 0, sizeof g);
        if (sscanf(line, "init %d", &init_code) == 1) continue;
        if (sscanf(line, "gpu %31s %d %llu %llu %d %llu %llu %d %31s %95[^\n]", g.pci, &g.energy, &g.ticks, &g.watts,
                   &g.power, &g.current, &g.average, &g.hip, g.unique, g.name) == 10 && n_gpus < MAX)
            gpus[n_gpus++] = g;
    }
    fclose(f);
}

static uint64_t ticks(const Gpu *g) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return g->ticks + g->watts * (now.tv_sec * 65536ull + now.tv_nsec * 65536ull / 1000000000ull);
}

static uint64_t location(const Gpu *g) {
    unsigned domain, bus, device, function;
    sscanf(g->pci, "%x:%x:%x.%x", &domain, &bus, &device, &function);
    return (uint64_t)domain << 32 | bus << 8 | device << 3 | function;
}

/* ---- libamd_smi.so */

typedef struct { uint32_t drm_render, drm_card, hsa_id, hip_id; char hip_uuid[256]; } Enumeration;
typedef struct {
    char market_name[256]; uint32_t vendor_id; char vendor_name[256]; uint32_t subvendor_id; uint64_t device_id;
    uint32_t rev_id; char asic_serial[256]; uint32_t oam_id, cus; uint64_t version; uint32_t subsystem_id, reserved[21];
} Asic;
typedef struct { char version[256], date[256], name[256]; } Driver;
typedef struct {
    uint64_t socket; uint32_t current, average; uint64_t gfx_v, soc_v, mem_v; uint32_t limit; uint64_t reserved[18];
} Power;

/* Not initialised; then, as a forked child that inherited the state, an internal error. */
#define READY do { load(); if (!owner) return 32; if (owner != getpid()) return 16; } while (0)
#define FIND Gpu *g; READY; { long i = (int *)h - tag; if (i < 0 || i >= n_gpus) return 31; g = &gpus[i]; if (g->energy == 31) return 31; }

int amdsmi_init(uint64_t flags) { (void)flags; load(); if (!init_code) owner = getpid(); return init_code; }
int amdsmi_shut_down(void) { if (owner != getpid()) return 32; owner = 0; return 0; }

int amdsmi_get_socket_handles(uint32_t *n, void **out) {
    READY;
    if (out) out[0] = &socket_tag;
    *n = 1;
    return 0;
}

int amdsmi_get_processor_handles(void *socket, uint32_t *n, void **out) {
    (void)socket;
    READY;
    if (out) for (int i = 0; i < n_gpus; i++) out[i] = &tag[i];
    *n = n_gpus;
    return 0;
}

int amdsmi_get_gpu_device_bdf(void *h, uint64_t *bdf) {
    FIND
    uint64_t l = location(g);
    *bdf = (l & 0xFFFF) | l >> 32 << 16;
    return 0;
}

int amdsmi_get_gpu_device_uuid(void *h, uint32_t *n, char *out) {
    FIND
    snprintf(out, *n, "aaff%s-0000-1000-8000-000000000000", g->unique);
    return 0;
}

int amdsmi_get_gpu_enumeration_info(void *h, Enumeration *out) {
    FIND
    memset(out, 0, sizeof *out);
    out->hip_id = g->hip;
    snprintf(out->hip_uuid, sizeof out->hip_uuid, "GPU-%s", g->unique);
    return g->hip < 0 ? 2 : 0; /* a ROCm that does not know HIP's order */
}

int amdsmi_get_gpu_asic_info(void *h, Asic *out) {
    FIND
    memset(out, 0, sizeof *out);
    snprintf(out->market_name, sizeof out->market_name, "%s", g->name);
    return 0;
}

int amdsmi_get_gpu_driver_info(void *h, Driver *out) {
    FIND
    (void)g;
    memset(out, 0, sizeof *out);
    strcpy(out->name, "amdgpu");
    strcpy(out->version, "6.12.12");
    return 0;
}

int amdsmi_get_power_info(void *h, Power *out) {
    FIND
    memset(out, 0, sizeof *out);
    out->socket = out->current = g->current;
    out->average = g->average;
    return g->power;
}

int amdsmi_get_energy_count(void *h, uint64_t *energy, float *resolution, uint64_t *stamp) {
    FIND
    *energy = ticks(g);
    *resolution = 15.3f;
    *stamp = 0;
    return g->energy;
}

/* ---- librocm_smi64.so */

#define RSMI_READY do { load(); if (!owner) return 8; if (owner != getpid()) return 6; } while (0)
#define RSMI_FIND Gpu *g; RSMI_READY; if ((int)i >= n_gpus) return 1; g = &gpus[i]; if (g->energy == 10) return 10;

int rsmi_init(uint64_t flags) { (void)flags; load(); if (!init_code) owner = getpid(); return init_code ? 8 : 0; }
int rsmi_shut_down(void) { if (owner != getpid()) return 8; owner = 0; return 0; }
int rsmi_num_monitor_devices(uint32_t *n) { RSMI_READY; *n = n_gpus; return 0; }
int rsmi_dev_pci_id_get(uint32_t i, uint64_t *out) { RSMI_FIND *out = location(g); return 0; }
int rsmi_dev_name_get(uint32_t i, char *out, size_t n) { RSMI_FIND snprintf(out, n, "%s", g->name); return 0; }
int rsmi_dev_unique_id_get(uint32_t i, uint64_t *out) { RSMI_FIND *out = strtoull(g->unique, NULL, 16); return 0; }

int rsmi_dev_energy_count_get(uint32_t i, uint64_t *energy, float *resolution, uint64_t *stamp) {
    RSMI_FIND
    *energy = ticks(g);
    *resolution = 15.3f;
    *stamp = 0;
    return g->energy;
}

#ifndef OLD_ROCM
int rsmi_dev_current_socket_power_get(uint32_t i, uint64_t *microwatts) {
    RSMI_FIND
    *microwatts = g->current * 1000000;
    return g->current == 0xFFFF ? 2 : g->power;
}
#endif

int rsmi_dev_power_ave_get(uint32_t i, uint32_t sensor, uint64_t *microwatts) {
    RSMI_FIND
    *microwatts = g->average * 1000000;
    return sensor ? 2 : g->power;
}

int rsmi_version_str_get(uint32_t component, char *out, uint32_t n) {
    RSMI_READY;
    if (component) return 2;
    snprintf(out, n, "6.12.12");
    return 0;
}

int rsmi_status_string(uint32_t code, const char **out) {
    *out = code == 4 ? "RSMI_STATUS_PERMISSION: Permission denied" : "RSMI_STATUS: fake";
    return 0;
}
