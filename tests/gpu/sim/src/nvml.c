/* NVML as far as crcli asks it. Like the real one it holds /dev/nvidia* open until nvmlShutdown. */
#define _GNU_SOURCE
#include "board.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct simulated_device *nvmlDevice_t; /* index + 1 */
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } nvmlProcessInfo_t;
typedef struct { unsigned long long total, available, used; } nvmlMemory_t;
typedef struct { unsigned version; unsigned long long total, reserved, available, used; } nvmlMemory_v2_t;

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, UNKNOWN = 999,
};

static struct host host;
static int users, nodes[MAX_GPUS + 2];

nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    if (host_read(simulator_folder(), &host))
        return DRIVER_NOT_LOADED;
    if (!users && nodes_open(&host, nodes))
        return UNKNOWN;
    users++;
    return SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void)
{
    if (!users)
        return UNINITIALIZED;
    if (!--users)
        nodes_close(nodes);
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t error) { return error ? "an error of the simulated NVML" : "Success"; }

/* What this host is like now: another one may have been configured since. NULL: no such device. */
static struct gpu *gpu_of(nvmlDevice_t device)
{
    uintptr_t number = (uintptr_t)device;
    if (!users || host_read(simulator_folder(), &host) || !number || number > (uintptr_t)host.count)
        return NULL;
    return &host.gpus[number - 1];
}

#define GPU_OR_RETURN(device)            \
    struct gpu *gpu = gpu_of(device);    \
    if (!gpu)                            \
        return users ? INVALID_ARGUMENT : UNINITIALIZED

static nvmlReturn_t say(const char *text, char *to, unsigned length)
{
    return (unsigned)snprintf(to, length, "%s", text) < length ? SUCCESS : INSUFFICIENT_SIZE;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) { return say(host.driver, version, length); }
nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) { return say("13.0", version, length); }

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = host.api;
    return users ? SUCCESS : UNINITIALIZED;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!users || host_read(simulator_folder(), &host))
        return UNINITIALIZED;
    *count = host.count;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    *device = (nvmlDevice_t)(uintptr_t)(index + 1);
    return gpu_of(*device) ? SUCCESS : users ? INVALID_ARGUMENT : UNINITIALIZED;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    int index = host_find(&host, uuid);
    return index < 0 ? NOT_FOUND : nvmlDeviceGetHandleByIndex_v2(index, device);
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    GPU_OR_RETURN(device);
    *index = gpu - host.gpus;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    GPU_OR_RETURN(device);
    return say(gpu->name, name, length);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    GPU_OR_RETURN(device);
    return say(gpu->uuid, uuid, length);
}

nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
    GPU_OR_RETURN(device);
    *minor = gpu->minor;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode)
{
    GPU_OR_RETURN(device);
    *mode = gpu->persistence;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    GPU_OR_RETURN(device);
    *current = *pending = gpu->mig;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode)
{
    GPU_OR_RETURN(device);
    *mode = 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    GPU_OR_RETURN(device);
    *major = gpu->compute_major;
    *minor = gpu->compute_minor;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    GPU_OR_RETURN(device);
    memory->total = gpu->memory;
    memory->used = memory_used(simulator_folder(), gpu);
    memory->available = memory->total - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    nvmlMemory_t all;
    nvmlReturn_t result = nvmlDeviceGetMemoryInfo(device, &all);
    if (!result)
        memory->total = all.total, memory->reserved = 0, memory->available = all.available, memory->used = all.used;
    return result;
}

/* What a process has of a GPU: its board knows. */
static uint64_t used_by(pid_t pid, const char *uuid)
{
    static struct board seen;
    if (board_of(pid, &seen))
        return 0;
    int index = host_find(&seen.host, uuid);
    return index < 0 || seen.clients[index].file < 0 ? 0 : seen.clients[index].used;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *infos)
{
    unsigned room = *count, found = 0;
    GPU_OR_RETURN(device);
    DIR *processes = host.tells_processes ? opendir("/proc") : NULL;
    for (struct dirent *one; processes && (one = readdir(processes));) {
        pid_t pid = isdigit(one->d_name[0]) ? atoi(one->d_name) : 0;
        uint64_t used = pid ? used_by(pid, gpu->uuid) : 0;
        if (!used)
            continue;
        if (found < room)
            infos[found] = (nvmlProcessInfo_t){pid, used, ~0u, ~0u};
        found++;
    }
    if (processes)
        closedir(processes);
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

static nvmlReturn_t nobody(nvmlDevice_t device, unsigned *count)
{
    GPU_OR_RETURN(device);
    *count = 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *infos)
{
    (void)infos;
    return nobody(device, count);
}

nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *infos)
{
    (void)infos;
    return nobody(device, count);
}
