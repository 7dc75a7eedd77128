/* cuCheckpoint…: calls that act on another process. What they do happens in its restore thread. */
#define _GNU_SOURCE
#include "board.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int post(pid_t pid, const struct request *request)
{
    struct iovec here = {(void *)request, sizeof *request}, there = {&ours->request, sizeof *request};
    return process_vm_writev(pid, &here, 1, &there, 1, 0) == sizeof *request ? 0 : -1;
}

static int locked_file(const char *path)
{
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    while (file >= 0 && flock(file, LOCK_EX) && errno == EINTR)
        ;
    return file;
}

static int queue_signal(pid_t pid, pid_t tid, uint64_t ticket)
{
    siginfo_t signal = {.si_signo = REQUEST_SIGNAL, .si_code = SI_QUEUE};
    signal.si_pid = getpid();
    signal.si_value.sival_ptr = (void *)ticket;
    return syscall(SYS_rt_tgsigqueueinfo, pid, tid, REQUEST_SIGNAL, &signal);
}

/* Wait until the request with this ticket is done (0: whichever is under way); -1 when the process is gone. */
static int wait_done(pid_t pid, uint64_t ticket, struct board *seen)
{
    for (unsigned waits = 0;; waits++) {
        if (board_of(pid, seen))
            return -1;
        if (ticket ? seen->done == ticket : seen->done == seen->taken)
            return 0;
        sleep_ms(waits < 20 ? 1 : 5);
    }
}

/* Have a process's restore thread do this, one request at a time; blocks for as long as the process is stopped. */
static CUresult ask(pid_t pid, struct board *seen, struct request *request)
{
    char turn[PATH_SIZE + 40], waiting[PATH_SIZE + 40];
    CUresult result = CUDA_ERROR_UNKNOWN; /* the process ended meanwhile */
    snprintf(turn, sizeof turn, "%s/calls", seen->folder);
    mkdir(turn, 0777);
    snprintf(turn, sizeof turn, "%s/calls/turn-%d", seen->folder, pid);
    if (getrandom(&request->ticket, sizeof request->ticket, 0) < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    snprintf(waiting, sizeof waiting, "%s/calls/%016lx", seen->folder, request->ticket);
    int turn_file = locked_file(turn), waiting_file = locked_file(waiting);
    if (turn_file >= 0 && waiting_file >= 0 && !wait_done(pid, 0, seen) &&
        !post(pid, request) &&
        !queue_signal(pid, restore_tid_of(pid, seen), request->ticket) &&
        !wait_done(pid, request->ticket, seen))
        result = seen->result;
    unlink(waiting);
    close(waiting_file);
    close(turn_file);
    return result;
}

static CUresult call(const char *name, pid_t pid, struct request *request, CUprocessState *state)
{
    struct board *seen = malloc(sizeof *seen);
    struct request breaking = {.operation = BREAK};
    CUresult result;
    struct host host;
    int known = !board_of(pid, seen), failed;
    char folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", known ? seen->folder : simulator_folder());
    host_read(folder, &host);
    call_log(folder, name, pid, "begin", 0);
    if (!(failed = fault_suffer(folder, name, pid, "before", &result))) {
        result = !known ? CUDA_ERROR_INVALID_VALUE
                 : host.api < 12080 ? CUDA_ERROR_NOT_SUPPORTED
                                          : ask(pid, seen, request);
        if (known && state)
            *state = seen->told;
        failed = fault_suffer(folder, name, pid, "after", &result);
    }
    if (failed == 2 && known)
        ask(pid, seen, &breaking);
    free(seen);
    call_log(folder, name, pid, "end", result);
    return result;
}

static int only_zeros(const void *from, size_t bytes)
{
    const char *byte = from;
    for (size_t i = 0; i < bytes; i++)
        if (byte[i])
            return 0;
    return 1;
}

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    struct board *seen = malloc(sizeof *seen);
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    int known = !board_of(pid, seen);
    const char *folder = known ? seen->folder : simulator_folder();
    if (!fault_suffer(folder, "tid", pid, "before", &result) && known && tid) {
        *tid = restore_tid_of(pid, seen);
        result = *tid > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }
    free(seen);
    return result;
}

CUresult cuCheckpointProcessGetState(int pid, CUprocessState *state)
{
    struct request request = {.operation = GET_STATE};
    return state ? call("state", pid, &request, state) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args)
{
    struct request request = {.operation = LOCK, .timeout_ms = args ? args->timeoutMs : 0};
    return call("lock", pid, &request, NULL);
}

/* What may stand where older drivers had reserved zeros is custom storage, since CUDA 13.4: which we do not have. */
static CUresult refuse_storage(const void *storage)
{
    struct host host;
    if (!storage)
        return CUDA_ERROR_INVALID_VALUE;
    return !host_read(simulator_folder(), &host) && host.api >= 13040 ? CUDA_ERROR_NOT_SUPPORTED
                                                                       : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args)
{
    struct request request = {.operation = CHECKPOINT};
    if (args && !only_zeros(args, sizeof *args))
        return refuse_storage(args->customStorageInfo_out);
    return call("checkpoint", pid, &request, NULL);
}

static int may_restore(void)
{
    struct host host;
    if (ours->owner == getpid())
        return 1;
    if (host_read(simulator_folder(), &host))
        return 0;
    for (int i = 0; i < host.count; i++)
        if (!host.gpus[i].persistence)
            return 0;
    return 1;
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    struct request request = {.operation = RESTORE};
    if (!may_restore())
        return CUDA_ERROR_NOT_INITIALIZED;
    if (args) {
        if (args->customStorageInfo_out)
            return refuse_storage(args->customStorageInfo_out);
        if (!only_zeros(args->reserved, sizeof args->reserved) ||
            args->gpuPairsCount > MAX_GPUS || (args->gpuPairsCount && !args->gpuPairs))
            return CUDA_ERROR_INVALID_VALUE;
        request.pair_count = args->gpuPairsCount;
        for (int i = 0; i < request.pair_count; i++) {
            uuid_text(&args->gpuPairs[i].oldUuid, request.pairs[i].old);
            uuid_text(&args->gpuPairs[i].newUuid, request.pairs[i].new);
        }
    }
    return call("restore", pid, &request, NULL);
}

CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args)
{
    struct request request = {.operation = UNLOCK};
    return args && !only_zeros(args, sizeof *args) ? CUDA_ERROR_INVALID_VALUE : call("unlock", pid, &request, NULL);
}

/* There from CUDA 13.4 on (see cuGetProcAddress_v2), where it completes nothing: nothing was begun. */
CUresult cuCheckpointOperationComplete(void *handle)
{
    (void)handle;
    return CUDA_ERROR_INVALID_VALUE;
}
