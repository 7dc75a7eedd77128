/* What the parts of the simulator share. A process that called cuInit has one board, in its own memory, at an
 * address that everybody knows: CRIU dumps and restores it like any other memory, and other processes read and
 * write it by the pid under which they see the process, whatever namespace it is in. */
#pragma once
#include "cuda_api.h"

#include <pthread.h>
#include <signal.h>
#include <sys/types.h>

enum { MAX_GPUS = 8, MAX_ALLOCATIONS = 256, PATH_SIZE = 512, PAGE = 4096 };

#define REQUEST_SIGNAL (SIGRTMIN + 7) /* queued to a restore thread: a request stands on its board */
#define MAGIC "crcli-gpu-sim-2"

struct gpu {
    char uuid[48], name[64]; /* "GPU-…", as NVIDIA's tools print it */
    uint64_t memory;         /* bytes */
    int minor, compute_major, compute_minor, persistence, mig;
};

/* The file `host` of the simulator's folder; see host_read. */
struct host {
    char driver[32];
    int api;               /* 13000: CUDA 13.0 */
    int init_ms;           /* how long cuInit takes */
    int tells_processes;   /* whether NVML tells who uses a GPU */
    uint64_t context_bytes;
    int count;
    struct gpu gpus[MAX_GPUS];
};

enum operation { GET_STATE = 1, LOCK, CHECKPOINT, RESTORE, UNLOCK, BREAK };

struct uuid_pair { char old[48], new[48]; };

/* Written by the caller, who then queues REQUEST_SIGNAL with the ticket as its value. */
struct request {
    uint64_t ticket;
    enum operation operation;
    unsigned timeout_ms;
    int pair_count;
    struct uuid_pair pairs[MAX_GPUS];
};

struct allocation {
    uint64_t address, bytes, offset; /* in the address space; in the client's file */
    int gpu, managed;
};

/* A process's share of one GPU: an open, locked file in the simulator's folder is its device memory. */
struct client {
    int file; /* -1: no context on this GPU, or checkpointed */
    int contexts, primary;
    uint64_t used, end; /* bytes in use, context included; where the next allocation goes */
};

struct board {
    char magic[16];
    uint64_t size; /* of this structure: another build is not understood */
    pid_t owner, restore_tid; /* as the process itself sees them */
    char folder[PATH_SIZE];
    struct host host; /* the GPUs that the kernel's driver has, from cuInit or the last restore */
    int visible[MAX_GPUS], visible_count; /* what CUDA_VISIBLE_DEVICES leaves */
    CUprocessState state;
    int closing, active; /* a lock waits; calls under way */
    struct client clients[MAX_GPUS]; /* by index into host.gpus */
    struct allocation allocations[MAX_ALLOCATIONS]; /* bytes == 0: free */
    int nodes[MAX_GPUS + 2];
    struct request request;
    uint64_t taken, done; /* tickets */
    CUresult result;
    CUprocessState told;
};

#define BOARD_ADDRESS 0x09ffe0000000
#define ours ((struct board *)BOARD_ADDRESS) /* this process's */
#define FIRST_DEVICE_ADDRESS 0x0a0000000000

extern pthread_mutex_t gate;
extern pthread_cond_t gate_moved;

/* host.c */
const char *simulator_folder(void);
int host_read(const char *folder, struct host *host);
int host_find(const struct host *host, const char *uuid);
void uuid_text(const CUuuid *uuid, char text[48]);
void uuid_bytes(const char *text, CUuuid *uuid);
void sleep_ms(unsigned ms);

/* memory.c */
int memory_claim(const char *folder, const struct gpu *gpu, uint64_t bytes); /* an open file; -1 out of memory */
int memory_grow(const char *folder, const struct gpu *gpu, int file, uint64_t bytes);
uint64_t memory_used(const char *folder, const struct gpu *gpu);
CUresult memory_read(uint64_t address, void *to, size_t bytes);
CUresult memory_write(uint64_t address, const void *from, size_t bytes);
CUresult memory_move_out(void); /* checkpoint: from the devices into this process */
CUresult memory_move_in(const struct host *host, const int *targets); /* restore */
struct allocation *memory_find(uint64_t address);
CUresult memory_allocate(int gpu, size_t bytes, int managed, CUdeviceptr *pointer);
CUresult memory_free(CUdeviceptr pointer);
int nodes_open(const struct host *host, int *nodes);
void nodes_close(int *nodes);

/* restore_thread.c */
int restore_thread_start(void);

/* other_process.c */
int board_of(pid_t pid, struct board *copy);
pid_t restore_tid_of(pid_t pid, const struct board *seen);

/* faults.c */
struct fault { char path[PATH_SIZE + 300], action[16]; int value; };
int fault_take(const char *folder, const char *call, pid_t pid, const char *when, struct fault *fault);
void call_log(const char *folder, const char *call, pid_t pid, const char *what, int result);
int fault_suffer(const char *folder, const char *call, pid_t pid, const char *when, CUresult *result);
