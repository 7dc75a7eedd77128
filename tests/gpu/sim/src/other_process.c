/* Another process's board, found by its pid as we see it, whatever namespace it is in. */
#define _GNU_SOURCE
#include "board.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* The last number of the line NSpid: what the task itself takes for its pid. */
static pid_t inner_pid(const char *status_path)
{
    char line[256];
    pid_t found = -1;
    FILE *file = fopen(status_path, "re");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, "NSpid:", 6))
            continue;
        char *last = line + strlen(line);
        while (last > line && isspace(last[-1]))
            *--last = 0;
        while (last > line && isdigit(last[-1]))
            last--;
        found = atoi(last);
        break;
    }
    if (file)
        fclose(file);
    return found;
}

/* Copy the board of a CUDA process; -1 when it is none (any more), or one of another simulated host than ours. */
int board_of(pid_t pid, struct board *copy)
{
    char path[64];
    const char *our_host = getenv("CRCLI_GPU_SIM");
    struct iovec here = {copy, sizeof *copy}, there = {(void *)BOARD_ADDRESS, sizeof *copy};
    if (process_vm_readv(pid, &here, 1, &there, 1, 0) != sizeof *copy)
        return -1;
    if (memcmp(copy->magic, MAGIC, sizeof MAGIC) || copy->size != sizeof *copy)
        return -1;
    if (our_host && strcmp(copy->folder, our_host))
        return -1;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    return inner_pid(path) == copy->owner ? 0 : -1; /* a child that was forked has the board, not the thread */
}

/* The restore thread's id as we see it; -1 when the process has ended. */
pid_t restore_tid_of(pid_t pid, const struct board *seen)
{
    char path[64];
    pid_t found = -1;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    for (struct dirent *one; tasks && found < 0 && (one = readdir(tasks));) {
        char status[400];
        snprintf(status, sizeof status, "/proc/%d/task/%s/status", pid, one->d_name);
        if (isdigit(one->d_name[0]) && inner_pid(status) == seen->restore_tid)
            found = atoi(one->d_name);
    }
    if (tasks)
        closedir(tasks);
    return found;
}
