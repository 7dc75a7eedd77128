/* What a CUDA program calls. Each call passes the gate, which is closed while the process is locked. */
#define _GNU_SOURCE
#include "board.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct simulated_context { int ordinal; };
struct simulated_module { int unused; };
struct simulated_stream { int unused; };
struct simulated_kernel {
    const char *name;
    CUresult (*run)(void **parameters);
};

static struct simulated_context contexts[MAX_GPUS];
static struct simulated_module the_module;
static struct simulated_stream the_stream;
static __thread CUcontext stack[16];
static __thread int depth;
static __thread int inside; /* a call made within a call has passed the gate */

static CUresult enter(void)
{
    if (ours->owner != getpid())
        return CUDA_ERROR_NOT_INITIALIZED; /* also in a child that was forked after cuInit */
    if (inside++)
        return CUDA_SUCCESS;
    pthread_mutex_lock(&gate);
    while (ours->state != CU_PROCESS_STATE_FAILED && (ours->state != CU_PROCESS_STATE_RUNNING || ours->closing))
        pthread_cond_wait(&gate_moved, &gate);
    int failed = ours->state == CU_PROCESS_STATE_FAILED;
    if (failed)
        inside--;
    else
        ours->active++;
    pthread_mutex_unlock(&gate);
    return failed ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

static CUresult leave(CUresult result)
{
    if (--inside)
        return result;
    pthread_mutex_lock(&gate);
    ours->active--;
    pthread_cond_broadcast(&gate_moved);
    pthread_mutex_unlock(&gate);
    return result;
}

#define CALL(...)                       \
    do {                                \
        CUresult entered = enter();     \
        return entered ? entered : leave(__VA_ARGS__); \
    } while (0)

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER; /* for the table of allocations */

static CUresult locked(CUresult (*change)(void *), void *argument)
{
    pthread_mutex_lock(&memory_lock);
    CUresult result = change(argument);
    pthread_mutex_unlock(&memory_lock);
    return result;
}

/* Which GPU of the host the current context is on; -1 without one. */
static int current_gpu(void)
{
    return depth && stack[depth - 1] ? ours->visible[stack[depth - 1]->ordinal] : -1;
}

static struct gpu *gpu_of(CUdevice device)
{
    return device >= 0 && device < ours->visible_count ? &ours->host.gpus[ours->visible[device]] : NULL;
}

/* ---- the driver itself ---- */

static void see_devices(void)
{
    const char *wanted = getenv("CUDA_VISIBLE_DEVICES");
    char words[512], *rest = NULL;
    ours->visible_count = 0;
    if (!wanted) {
        for (int i = 0; i < ours->host.count; i++)
            ours->visible[ours->visible_count++] = i;
        return;
    }
    snprintf(words, sizeof words, "%s", wanted);
    for (char *word = strtok_r(words, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        int index = strncmp(word, "GPU-", 4) ? atoi(word) : host_find(&ours->host, word);
        if (index < 0 || index >= ours->host.count || ours->visible_count == MAX_GPUS)
            break;
        ours->visible[ours->visible_count++] = index;
    }
}

static __attribute__((constructor)) void make_board(void)
{
    void *at = mmap((void *)BOARD_ADDRESS, sizeof *ours, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != (void *)BOARD_ADDRESS) {
        fputs("the CUDA simulator: its address is taken\n", stderr);
        abort();
    }
}

static void forget_in_child(void)
{
    for (int i = 0; i < MAX_GPUS; i++)
        if (ours->clients[i].file >= 0)
            close(ours->clients[i].file);
    memset(ours, 0, sizeof *ours); /* no CUDA here; the open /dev/nvidia* stay, as with the real driver */
    pthread_mutex_init(&gate, NULL);
    ours->owner = -1;
}

static CUresult initialise(void)
{
    static int forks_are_watched;
    memset(ours, 0, sizeof *ours);
    for (int i = 0; i < MAX_GPUS; i++)
        ours->clients[i] = (struct client){.file = -1, .end = PAGE};
    snprintf(ours->folder, sizeof ours->folder, "%s", simulator_folder());
    if (host_read(ours->folder, &ours->host) || !ours->host.count)
        return CUDA_ERROR_NO_DEVICE;
    sleep_ms(ours->host.init_ms);
    if (nodes_open(&ours->host, ours->nodes))
        return CUDA_ERROR_OPERATING_SYSTEM;
    see_devices();
    for (int i = 0; i < MAX_GPUS; i++)
        contexts[i].ordinal = i;
    if (!forks_are_watched++)
        pthread_atfork(NULL, NULL, forget_in_child);
    ours->size = sizeof *ours;
    if (restore_thread_start()) {
        nodes_close(ours->nodes);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    ours->owner = getpid();
    memcpy(ours->magic, MAGIC, sizeof MAGIC);
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    CUresult result = CUDA_SUCCESS;
    if (flags)
        return CUDA_ERROR_INVALID_VALUE;
    if (ours->owner == -1)
        return CUDA_ERROR_NOT_INITIALIZED;
    pthread_mutex_lock(&once);
    if (!ours->owner) {
        call_log(simulator_folder(), "init", getpid(), "begin", 0);
        if (!fault_suffer(simulator_folder(), "init", getpid(), "before", &result))
            result = initialise();
        call_log(simulator_folder(), "init", getpid(), "end", result);
    }
    pthread_mutex_unlock(&once);
    return result;
}

CUresult cuDriverGetVersion(int *version)
{
    struct host host;
    if (host_read(simulator_folder(), &host))
        return CUDA_ERROR_UNKNOWN;
    *version = host.api;
    return CUDA_SUCCESS;
}

/* ---- devices ---- */

CUresult cuDeviceGetCount(int *count)
{
    CUresult entered = enter();
    return entered ? entered : leave((*count = ours->visible_count, CUDA_SUCCESS));
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    CUresult entered = enter();
    if (entered)
        return entered;
    *device = ordinal;
    return leave(gpu_of(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    struct gpu *gpu = gpu_of(device);
    if (!gpu)
        return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, length, "%s", gpu->name);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    struct gpu *gpu = gpu_of(device);
    if (!gpu)
        return CUDA_ERROR_INVALID_DEVICE;
    uuid_bytes(gpu->uuid, uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    struct gpu *gpu = gpu_of(device);
    if (!gpu)
        return CUDA_ERROR_INVALID_DEVICE;
    *bytes = gpu->memory;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    enum { COMPUTE_MAJOR = 75, COMPUTE_MINOR = 76, MANAGED_MEMORY = 83, UNIFIED_ADDRESSING = 41 };
    struct gpu *gpu = gpu_of(device);
    if (!gpu)
        return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute == COMPUTE_MAJOR                                            ? gpu->compute_major
             : attribute == COMPUTE_MINOR                                          ? gpu->compute_minor
             : attribute == MANAGED_MEMORY || attribute == UNIFIED_ADDRESSING ? 1
                                                                                   : 0;
    return CUDA_SUCCESS;
}

/* ---- contexts: one for each device, whoever makes it ---- */

static CUresult open_context(void *argument)
{
    struct client *client = &ours->clients[ours->visible[*(int *)argument]];
    struct gpu *gpu = &ours->host.gpus[ours->visible[*(int *)argument]];
    if (!client->contexts++ && client->file < 0) {
        client->used = ours->host.context_bytes;
        client->end = PAGE;
        client->file = memory_claim(ours->folder, gpu, client->used);
        if (client->file < 0) {
            client->contexts--;
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
    }
    return CUDA_SUCCESS;
}

static CUresult close_context(void *argument)
{
    int gpu = ours->visible[*(int *)argument];
    struct client *client = &ours->clients[gpu];
    if (!client->contexts || --client->contexts)
        return CUDA_SUCCESS;
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (ours->allocations[i].bytes && ours->allocations[i].gpu == gpu)
            memory_free(ours->allocations[i].address);
    close(client->file);
    client->file = -1;
    return CUDA_SUCCESS;
}

static CUresult make_context(CUcontext *context, CUdevice device, int push)
{
    CUresult result = enter();
    if (result)
        return result;
    if (!gpu_of(device))
        return leave(CUDA_ERROR_INVALID_DEVICE);
    result = locked(open_context, &device);
    if (!result) {
        *context = &contexts[device];
        if (push && depth < 16)
            stack[depth++] = *context;
    }
    return leave(result);
}

CUresult cuCtxCreate_v2(CUcontext *context, unsigned flags, CUdevice device)
{
    (void)flags;
    return make_context(context, device, 1);
}

CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned flags, CUdevice device)
{
    (void)parameters;
    return cuCtxCreate_v2(context, flags, device);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return make_context(context, device, 0); }

static CUresult drop_context(int ordinal)
{
    CALL(locked(close_context, &ordinal));
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    return gpu_of(device) ? drop_context(device) : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuCtxDestroy_v2(CUcontext context)
{
    if (!context)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (depth && stack[depth - 1] == context)
        depth--;
    return drop_context(context->ordinal);
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    if (!depth)
        depth = 1;
    stack[depth - 1] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = depth ? stack[depth - 1] : NULL;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    if (depth == 16)
        return CUDA_ERROR_INVALID_VALUE;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    CUcontext top = stack[--depth];
    if (context)
        *context = top;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    if (current_gpu() < 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = stack[depth - 1]->ordinal;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) { CALL(CUDA_SUCCESS); }

/* ---- memory ---- */

struct wish { CUdeviceptr *pointer; size_t bytes; int managed, gpu; };

static CUresult allocate(void *argument)
{
    struct wish *wish = argument;
    return memory_allocate(wish->gpu, wish->bytes, wish->managed, wish->pointer);
}

static CUresult free_memory(void *argument) { return memory_free(*(CUdeviceptr *)argument); }

static CUresult allocate_here(CUdeviceptr *pointer, size_t bytes, int managed)
{
    CUresult entered = enter();
    if (entered)
        return entered;
    struct wish wish = {pointer, bytes, managed, current_gpu()};
    return leave(wish.gpu < 0 ? CUDA_ERROR_INVALID_CONTEXT : locked(allocate, &wish));
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) { return allocate_here(pointer, bytes, 0); }

CUresult cuMemAllocManaged(CUdeviceptr *pointer, size_t bytes, unsigned flags)
{
    (void)flags;
    return allocate_here(pointer, bytes, 1);
}

CUresult cuMemFree_v2(CUdeviceptr pointer) { CALL(locked(free_memory, &pointer)); }
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) { CALL(memory_write(to, from, bytes)); }
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) { CALL(memory_read(from, to, bytes)); }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    (void)stream;
    return cuMemcpyHtoD_v2(to, from, bytes);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    (void)stream;
    return cuMemcpyDtoH_v2(to, from, bytes);
}

static CUresult fill(CUdeviceptr to, const void *pattern, size_t width, size_t count)
{
    char block[1 << 16];
    for (size_t i = 0; i + width <= sizeof block; i += width)
        memcpy(block + i, pattern, width);
    for (size_t left = width * count; left;) {
        size_t bytes = left < sizeof block ? left : sizeof block;
        CUresult result = memory_write(to, block, bytes);
        if (result)
            return result;
        to += bytes, left -= bytes;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) { CALL(fill(to, &value, 1, count)); }
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { CALL(fill(to, &value, 4, count)); }

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    char block[1 << 16];
    CUresult result = CUDA_SUCCESS;
    for (size_t done = 0; done < bytes && !result; done += sizeof block) {
        size_t some = bytes - done < sizeof block ? bytes - done : sizeof block;
        result = memory_read(from + done, block, some);
        if (!result)
            result = memory_write(to + done, block, some);
    }
    return result;
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { CALL(copy(to, from, bytes)); }

CUresult cuMemGetInfo_v2(size_t *available, size_t *total)
{
    CUresult entered = enter();
    int index = entered ? -1 : current_gpu();
    if (entered || index < 0)
        return entered ? entered : leave(CUDA_ERROR_INVALID_CONTEXT);
    struct gpu *gpu = &ours->host.gpus[index];
    *total = gpu->memory;
    *available = gpu->memory - memory_used(ours->folder, gpu);
    return leave(CUDA_SUCCESS);
}

CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags)
{
    (void)flags;
    *pointer = malloc(bytes);
    return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFreeHost(void *pointer)
{
    free(pointer);
    return CUDA_SUCCESS;
}

/* ---- kernels: two are built in, whatever module is loaded ---- */

/* affine(CUdeviceptr x, uint64_t n, uint64_t a, uint64_t b): x[i] = a * x[i] + b for all i < n. */
static CUresult run_affine(void **parameters)
{
    uint64_t at = *(uint64_t *)parameters[0], left = *(uint64_t *)parameters[1], a = *(uint64_t *)parameters[2],
             b = *(uint64_t *)parameters[3], block[4096];
    while (left) {
        uint64_t count = left < 4096 ? left : 4096;
        if (memory_read(at, block, count * 8))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        for (uint64_t i = 0; i < count; i++)
            block[i] = a * block[i] + b;
        memory_write(at, block, count * 8);
        at += count * 8, left -= count;
    }
    return CUDA_SUCCESS;
}

/* spin(uint64_t milliseconds): keeps the GPU busy for so long. */
static CUresult run_spin(void **parameters)
{
    sleep_ms(*(uint64_t *)parameters[0]);
    return CUDA_SUCCESS;
}

static struct simulated_kernel kernels[] = {{"affine", run_affine}, {"spin", run_spin}};

CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    (void)image;
    *module = &the_module;
    CALL(CUDA_SUCCESS);
}

CUresult cuModuleUnload(CUmodule module)
{
    (void)module;
    CALL(CUDA_SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    (void)module;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(kernels[i].name, name)) {
            *function = &kernels[i];
            CALL(CUDA_SUCCESS);
        }
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared_bytes, CUstream stream, void **parameters, void **extra)
{
    (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared_bytes, (void)stream, (void)extra;
    if (!function || !parameters)
        return CUDA_ERROR_INVALID_HANDLE;
    CALL(current_gpu() < 0 ? CUDA_ERROR_INVALID_CONTEXT : function->run(parameters));
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    (void)flags;
    *stream = &the_stream;
    CALL(CUDA_SUCCESS);
}

CUresult cuStreamSynchronize(CUstream stream)
{
    (void)stream;
    CALL(CUDA_SUCCESS);
}

CUresult cuStreamDestroy_v2(CUstream stream)
{
    (void)stream;
    CALL(CUDA_SUCCESS);
}

/* ---- names ---- */

static const struct { CUresult error; const char *name, *text; } errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult cuGetErrorName(CUresult error, const char **name)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error) {
            *name = errors[i].name;
            return CUDA_SUCCESS;
        }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].error == error) {
            *text = errors[i].text;
            return CUDA_SUCCESS;
        }
    *text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

/* The function of that name for programs made for CUDA `version`: the newest variant that is not newer than it. */
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    enum { FOUND = 0, NOT_FOUND = 1, VERSION_NOT_SUFFICIENT = 2 };
    static const struct { const char *suffix; int since; } variants[] = {{"_v4", 13000}, {"_v2", 3020}, {"", 0}};
    struct host host;
    Dl_info self;
    char symbol[128];
    (void)flags;
    *function = NULL;
    dladdr(cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_NOW);
    for (size_t i = 0; library && i < sizeof variants / sizeof *variants && !*function; i++) {
        snprintf(symbol, sizeof symbol, "%s%s", name, variants[i].suffix);
        if (version >= variants[i].since)
            *function = dlsym(library, symbol);
    }
    if (library)
        dlclose(library);
    int since = !strcmp(name, "cuCheckpointOperationComplete") ? 13040 : !strncmp(name, "cuCheckpoint", 12) ? 12080 : 0;
    if (since && !host_read(simulator_folder(), &host) && host.api < since)
        *function = NULL;
    if (status)
        *status = *function ? FOUND : NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
