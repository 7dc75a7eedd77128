/* Device memory: files in the simulator's folder, one for each process and GPU, held open and locked.
 *
 * A GPU is a folder gpus/UUID of them. A file that nobody holds locked belonged to a process that has ended: its
 * memory is free again. The first page says how much is in use; the bytes are never mapped accessibly (PROT_NONE):
 * as with a real GPU the processor cannot reach them, but their addresses are taken. A checkpoint puts private
 * memory of the process in the place of that mapping and gives up the file; a restore does the reverse. */
#define _GNU_SOURCE
#include "board.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 1 << 20 };

static uint64_t pages(uint64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

/* The whole accounting of a GPU happens under its lock. */
static int gpu_lock(const char *folder, const struct gpu *gpu)
{
    char path[PATH_SIZE + 80];
    snprintf(path, sizeof path, "%s/gpus", folder);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/gpus/%s", folder, gpu->uuid);
    mkdir(path, 0777);
    strcat(path, ".lock");
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    while (lock >= 0 && flock(lock, LOCK_EX) && errno == EINTR)
        ;
    return lock;
}

static uint64_t used_under_lock(const char *folder, const struct gpu *gpu)
{
    char path[PATH_SIZE + 80];
    uint64_t sum = 0;
    snprintf(path, sizeof path, "%s/gpus/%s", folder, gpu->uuid);
    DIR *clients = opendir(path);
    for (struct dirent *one; clients && (one = readdir(clients));) {
        uint64_t bytes = 0;
        int file = one->d_name[0] == '.' ? -1 : openat(dirfd(clients), one->d_name, O_RDONLY | O_CLOEXEC);
        if (file < 0)
            continue;
        if (!flock(file, LOCK_EX | LOCK_NB))
            unlinkat(dirfd(clients), one->d_name, 0);
        else if (pread(file, &bytes, sizeof bytes, 0) == sizeof bytes)
            sum += bytes;
        close(file);
    }
    if (clients)
        closedir(clients);
    return sum;
}

uint64_t memory_used(const char *folder, const struct gpu *gpu)
{
    int lock = gpu_lock(folder, gpu);
    uint64_t used = used_under_lock(folder, gpu);
    close(lock);
    return used;
}

/* The process has this much of the GPU now; -1 when the GPU does not have it. */
int memory_grow(const char *folder, const struct gpu *gpu, int file, uint64_t bytes)
{
    int lock = gpu_lock(folder, gpu), done = -1;
    uint64_t mine = 0;
    if (pread(file, &mine, sizeof mine, 0) < 0)
        mine = 0;
    if (used_under_lock(folder, gpu) - mine + bytes <= gpu->memory)
        done = pwrite(file, &bytes, sizeof bytes, 0) == sizeof bytes ? 0 : -1;
    close(lock);
    return done;
}

int memory_claim(const char *folder, const struct gpu *gpu, uint64_t bytes)
{
    char path[PATH_SIZE + 80];
    int lock = gpu_lock(folder, gpu);
    snprintf(path, sizeof path, "%s/gpus/%s/XXXXXX", folder, gpu->uuid);
    int file = mkostemp(path, O_CLOEXEC);
    if (file >= 0) {
        flock(file, LOCK_EX | LOCK_NB);
        uint64_t none = 0;
        if (pwrite(file, &none, sizeof none, 0) < 0) {
            close(file);
            file = -1;
        }
    }
    close(lock);
    if (file >= 0 && memory_grow(folder, gpu, file, bytes)) {
        close(file);
        file = -1;
    }
    return file;
}

struct allocation *memory_find(uint64_t address)
{
    for (struct allocation *one = ours->allocations; one < ours->allocations + MAX_ALLOCATIONS; one++)
        if (one->bytes && address >= one->address && address < one->address + one->bytes)
            return one;
    return NULL;
}

static struct allocation *memory_spans(uint64_t address, size_t bytes)
{
    struct allocation *found = memory_find(address);
    return found && bytes <= found->address + found->bytes - address ? found : NULL;
}

static int move(int file, char *memory, uint64_t bytes, uint64_t offset, int out)
{
    while (bytes) {
        ssize_t moved = out ? pwrite(file, memory, bytes, offset) : pread(file, memory, bytes, offset);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return -1;
        memory += moved, offset += moved, bytes -= moved;
    }
    return 0;
}

CUresult memory_read(uint64_t address, void *to, size_t bytes)
{
    struct allocation *from = memory_spans(address, bytes);
    if (!from)
        return CUDA_ERROR_INVALID_VALUE;
    if (from->managed)
        memcpy(to, (void *)address, bytes);
    else if (move(ours->clients[from->gpu].file, to, bytes, from->offset + (address - from->address), 0))
        return CUDA_ERROR_UNKNOWN;
    return CUDA_SUCCESS;
}

CUresult memory_write(uint64_t address, const void *from, size_t bytes)
{
    struct allocation *to = memory_spans(address, bytes);
    if (!to)
        return CUDA_ERROR_INVALID_VALUE;
    if (to->managed)
        memcpy((void *)address, from, bytes);
    else if (move(ours->clients[to->gpu].file, (char *)from, bytes, to->offset + (address - to->address), 1))
        return CUDA_ERROR_UNKNOWN;
    return CUDA_SUCCESS;
}

static uint64_t next_address(void)
{
    uint64_t next = FIRST_DEVICE_ADDRESS;
    for (struct allocation *one = ours->allocations; one < ours->allocations + MAX_ALLOCATIONS; one++)
        if (one->bytes && one->address + one->bytes > next)
            next = one->address + one->bytes;
    return (next + CHUNK) / CHUNK * CHUNK;
}

/* At the offset that is its address, as NVIDIA's driver has it: by that it is told in /proc/PID/maps. */
static void *map_managed(uint64_t address, uint64_t bytes, int node)
{
    return mmap((void *)address, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE, node, address);
}

static void *map_device(uint64_t address, const struct allocation *one, int file, int fixed)
{
    void *at = mmap((void *)address, one->bytes, PROT_NONE, MAP_SHARED | fixed, file, one->offset);
    if (at != MAP_FAILED)
        madvise(at, one->bytes, MADV_DONTFORK);
    return at;
}

CUresult memory_allocate(int gpu, size_t bytes, int managed, CUdeviceptr *pointer)
{
    struct client *client = &ours->clients[gpu];
    struct allocation *one = ours->allocations;
    while (one < ours->allocations + MAX_ALLOCATIONS && one->bytes)
        one++;
    if (one == ours->allocations + MAX_ALLOCATIONS || !bytes)
        return bytes ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
    struct allocation wanted = {0, pages(bytes), client->end, gpu, managed};
    if (memory_grow(ours->folder, &ours->host.gpus[gpu], client->file, client->used + wanted.bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    void *at;
    if (managed)
        at = map_managed(next_address(), wanted.bytes, ours->nodes[1]);
    else if (ftruncate(client->file, client->end + wanted.bytes))
        at = MAP_FAILED;
    else
        at = map_device(next_address(), &wanted, client->file, 0);
    if (at == MAP_FAILED) {
        memory_grow(ours->folder, &ours->host.gpus[gpu], client->file, client->used);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    client->used += wanted.bytes;
    client->end += managed ? 0 : wanted.bytes;
    wanted.address = *pointer = (uint64_t)at;
    *one = wanted;
    return CUDA_SUCCESS;
}

CUresult memory_free(CUdeviceptr pointer)
{
    struct allocation *one = memory_find(pointer);
    if (!one || one->address != pointer)
        return CUDA_ERROR_INVALID_VALUE;
    struct client *client = &ours->clients[one->gpu];
    munmap((void *)one->address, one->bytes);
    if (!one->managed)
        fallocate(client->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, one->offset, one->bytes);
    client->used -= one->bytes;
    memory_grow(ours->folder, &ours->host.gpus[one->gpu], client->file, client->used);
    one->bytes = 0;
    return CUDA_SUCCESS;
}

static void client_close(struct client *client)
{
    char link[64], path[PATH_SIZE];
    if (client->file < 0)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", client->file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        unlink(path);
    }
    close(client->file);
    client->file = -1;
}

/* All bytes are here, in private memory at their addresses, and no device is open; or nothing has changed. */
CUresult memory_move_out(void)
{
    char *copies[MAX_ALLOCATIONS] = {0};
    CUresult result = CUDA_SUCCESS;
    for (int i = 0; i < MAX_ALLOCATIONS; i++)
        if (ours->allocations[i].bytes && ours->allocations[i].managed)
            return CUDA_ERROR_NOT_SUPPORTED;
    for (int i = 0; i < ours->host.count; i++)
        if (ours->clients[i].file >= 0 && ours->host.gpus[i].mig)
            return CUDA_ERROR_NOT_SUPPORTED;
    for (int i = 0; i < MAX_ALLOCATIONS && !result; i++) {
        struct allocation *one = &ours->allocations[i];
        if (!one->bytes)
            continue;
        char *copy = mmap(NULL, one->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (copy == MAP_FAILED)
            result = CUDA_ERROR_OUT_OF_MEMORY;
        else if ((copies[i] = copy, move(ours->clients[one->gpu].file, copy, one->bytes, one->offset, 0)))
            result = CUDA_ERROR_UNKNOWN;
    }
    for (int i = 0; i < MAX_ALLOCATIONS; i++) {
        struct allocation *one = &ours->allocations[i];
        if (copies[i] && result)
            munmap(copies[i], one->bytes);
        else if (copies[i])
            mremap(copies[i], one->bytes, one->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)one->address);
    }
    if (result)
        return result;
    for (int i = 0; i < ours->host.count; i++)
        client_close(&ours->clients[i]);
    nodes_close(ours->nodes);
    return CUDA_SUCCESS;
}

/* All bytes are on the devices `targets` (by index into `host`, for each old index), or nothing has changed. */
CUresult memory_move_in(const struct host *host, const int *targets)
{
    struct client clients[MAX_GPUS];
    int nodes[MAX_GPUS + 2];
    CUresult result = nodes_open(host, nodes) ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
    for (int i = 0; i < MAX_GPUS; i++)
        clients[i] = (struct client){.file = -1};
    for (int i = 0; i < ours->host.count && !result; i++) {
        struct client *old = &ours->clients[i], *new = &clients[targets[i]];
        if (!old->contexts && !old->primary)
            continue;
        *new = *old;
        new->file = memory_claim(ours->folder, &host->gpus[targets[i]], old->used);
        if (new->file < 0)
            result = CUDA_ERROR_OUT_OF_MEMORY;
        else if (ftruncate(new->file, new->end))
            result = CUDA_ERROR_OUT_OF_MEMORY;
    }
    for (int i = 0; i < MAX_ALLOCATIONS && !result; i++) {
        struct allocation *one = &ours->allocations[i];
        if (one->bytes && move(clients[targets[one->gpu]].file, (char *)one->address, one->bytes, one->offset, 1))
            result = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (result) {
        for (int i = 0; i < MAX_GPUS; i++)
            client_close(&clients[i]);
        nodes_close(nodes);
        return result;
    }
    for (int i = 0; i < MAX_ALLOCATIONS; i++) {
        struct allocation *one = &ours->allocations[i];
        if (!one->bytes)
            continue;
        one->gpu = targets[one->gpu];
        map_device(one->address, one, clients[one->gpu].file, MAP_FIXED);
    }
    memcpy(ours->clients, clients, sizeof clients);
    memcpy(ours->nodes, nodes, sizeof nodes);
    return CUDA_SUCCESS;
}

static int node_open(const char *name, int minor)
{
    char path[32];
    snprintf(path, sizeof path, minor < 0 ? "/dev/%s" : "/dev/%s%d", name, minor);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* nvidiactl, nvidia-uvm, and that of each GPU are open in `nodes`, -1 elsewhere; -1 when one cannot be. */
int nodes_open(const struct host *host, int *nodes)
{
    int failed = 0;
    for (int i = 0; i < MAX_GPUS + 2; i++)
        nodes[i] = -1;
    nodes[0] = node_open("nvidiactl", -1);
    nodes[1] = node_open("nvidia-uvm", -1);
    for (int i = 0; i < host->count; i++)
        nodes[2 + i] = node_open("nvidia", host->gpus[i].minor);
    for (int i = 0; i < 2 + host->count; i++)
        failed |= nodes[i] < 0;
    if (failed)
        nodes_close(nodes);
    return failed ? -1 : 0;
}

void nodes_close(int *nodes)
{
    for (int i = 0; i < MAX_GPUS + 2; i++) {
        if (nodes[i] >= 0)
            close(nodes[i]);
        nodes[i] = -1;
    }
}
