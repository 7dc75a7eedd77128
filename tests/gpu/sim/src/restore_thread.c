/* The thread of a CUDA process that serves other processes' cuCheckpoint calls, and the gate for its own calls. */
#define _GNU_SOURCE
#include "board.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t gate_moved = PTHREAD_COND_INITIALIZER;

static CUresult lock(unsigned timeout_ms)
{
    struct timespec end;
    CUresult result = CUDA_SUCCESS;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (end.tv_nsec >= 1000000000L)
        end.tv_sec++, end.tv_nsec -= 1000000000L;
    pthread_mutex_lock(&gate);
    if (ours->state != CU_PROCESS_STATE_RUNNING) {
        pthread_mutex_unlock(&gate);
        return CUDA_ERROR_ILLEGAL_STATE;
    }
    ours->closing = 1;
    while (ours->active && !result) {
        if (!timeout_ms)
            pthread_cond_wait(&gate_moved, &gate);
        else if (pthread_cond_clockwait(&gate_moved, &gate, CLOCK_MONOTONIC, &end) == ETIMEDOUT && ours->active)
            result = CUDA_ERROR_NOT_READY;
    }
    ours->closing = 0;
    if (!result)
        ours->state = CU_PROCESS_STATE_LOCKED;
    pthread_cond_broadcast(&gate_moved);
    pthread_mutex_unlock(&gate);
    return result;
}

static void become(CUprocessState state)
{
    pthread_mutex_lock(&gate);
    ours->state = state;
    pthread_cond_broadcast(&gate_moved);
    pthread_mutex_unlock(&gate);
}

static CUresult checkpoint(void)
{
    if (ours->state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    CUresult result = memory_move_out();
    if (!result)
        become(CU_PROCESS_STATE_CHECKPOINTED);
    return result;
}

/* Which GPU of this host each one that the process knows becomes: all of them must have one of their own. */
static CUresult find_targets(const struct request *request, const struct host *host, int *targets)
{
    int taken[MAX_GPUS] = {0};
    for (int i = 0; i < ours->host.count; i++) {
        const struct gpu *old = &ours->host.gpus[i], *new;
        const char *wanted = request->pair_count ? NULL : old->uuid;
        for (int j = 0; j < request->pair_count; j++)
            if (!strcmp(request->pairs[j].old, old->uuid))
                wanted = request->pairs[j].new;
        int target = wanted ? host_find(host, wanted) : -1;
        if (target < 0 || taken[target]++)
            return CUDA_ERROR_INVALID_VALUE;
        new = &host->gpus[target];
        if (strcmp(old->name, new->name) || old->compute_major != new->compute_major ||
            old->compute_minor != new->compute_minor)
            return CUDA_ERROR_INVALID_VALUE;
        targets[i] = target;
    }
    return CUDA_SUCCESS;
}

static CUresult restore(const struct request *request)
{
    struct host host;
    int targets[MAX_GPUS];
    if (ours->state != CU_PROCESS_STATE_CHECKPOINTED)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (host_read(ours->folder, &host))
        return CUDA_ERROR_NOT_INITIALIZED;
    if (request->pair_count && host.api < 13000)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = find_targets(request, &host, targets);
    if (!result)
        result = memory_move_in(&host, targets);
    if (result)
        return result;
    for (int i = 0; i < ours->visible_count; i++)
        ours->visible[i] = targets[ours->visible[i]];
    ours->host = host;
    become(CU_PROCESS_STATE_LOCKED);
    return CUDA_SUCCESS;
}

static CUresult unlock(void)
{
    if (ours->state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    become(CU_PROCESS_STATE_RUNNING);
    return CUDA_SUCCESS;
}

/* A caller keeps the file of its ticket locked: without it, it has gone, or we are a copy of whom it meant. */
static int is_waited_for(uint64_t ticket)
{
    char path[PATH_SIZE + 40];
    snprintf(path, sizeof path, "%s/calls/%016lx", ours->folder, ticket);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    int waited_for = flock(file, LOCK_SH | LOCK_NB) != 0;
    close(file);
    return waited_for;
}

static CUresult serve(const struct request *request)
{
    ours->told = ours->state;
    switch (request->operation) {
    case GET_STATE: return CUDA_SUCCESS;
    case LOCK: return lock(request->timeout_ms);
    case CHECKPOINT: return checkpoint();
    case RESTORE: return restore(request);
    case UNLOCK: return unlock();
    case BREAK: become(CU_PROCESS_STATE_FAILED); return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

static void *restore_thread(void *started)
{
    sigset_t requests;
    siginfo_t signal;
    prctl(PR_SET_NAME, "cuda-simulator");
    sigemptyset(&requests);
    sigaddset(&requests, REQUEST_SIGNAL);
    __atomic_store_n(&ours->restore_tid, gettid(), __ATOMIC_RELEASE);
    pthread_barrier_wait(started);
    for (;;) {
        if (sigwaitinfo(&requests, &signal) < 0)
            continue;
        uint64_t ticket = (uint64_t)signal.si_value.sival_ptr;
        if (ours->request.ticket != ticket || ours->taken == ticket || !is_waited_for(ticket))
            continue;
        __atomic_store_n(&ours->taken, ticket, __ATOMIC_RELEASE);
        ours->result = serve(&ours->request);
        __atomic_store_n(&ours->done, ticket, __ATOMIC_RELEASE);
    }
    return NULL;
}

int restore_thread_start(void)
{
    pthread_barrier_t started;
    pthread_t thread;
    sigset_t all, before;
    pthread_barrier_init(&started, NULL, 2);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, NULL, restore_thread, &started);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) {
        pthread_detach(thread);
        pthread_barrier_wait(&started);
    }
    pthread_barrier_destroy(&started); /* waits until the thread has left it */
    return failed ? -1 : 0;
}
