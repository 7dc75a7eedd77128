/* What goes wrong on purpose, and the record of all calls: files in the simulator's folder.
 *
 * Each file of faults/ is one fault, one line: CALL PID SKIP TIMES WHEN ACTION VALUE. CALL is init, tid, state, lock,
 * checkpoint, restore or unlock; PID as its caller sees the process, 0 for any; the first SKIP such calls are spared, then
 * TIMES suffer (-1: all). WHEN is `before` (nothing is done) or `after` (it is done, but the caller does not get to know).
 * ACTION: `error` returns VALUE; `delay` waits VALUE ms and goes on; `hang` waits until the file is removed, and goes
 * on; `fail` makes the process FAILED and returns VALUE; `die` kills the caller. */
#define _GNU_SOURCE
#include "board.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int fault_due(struct fault *fault, const char *call, pid_t pid, const char *when)
{
    char its_call[16], its_when[16];
    int its_pid, skip, times;
    FILE *file = fopen(fault->path, "r+e");
    if (!file)
        return 0;
    int due = fscanf(file, "%15s %d %d %d %15s %15s %d", its_call, &its_pid, &skip, &times, its_when, fault->action,
                     &fault->value) == 7 &&
              !strcmp(its_call, call) && !strcmp(its_when, when) && (!its_pid || its_pid == pid) && times;
    if (due) {
        due = skip <= 0;
        skip > 0 ? skip-- : times > 0 ? times-- : 0;
        rewind(file);
        if (ftruncate(fileno(file), 0) == 0)
            fprintf(file, "%s %d %d %d %s %s %d\n", its_call, its_pid, skip, times, its_when, fault->action,
                    fault->value);
    }
    fclose(file);
    return due;
}

int fault_take(const char *folder, const char *call, pid_t pid, const char *when, struct fault *fault)
{
    char path[PATH_SIZE + 16];
    struct dirent **names;
    int found = 0;
    snprintf(path, sizeof path, "%s/faults", folder);
    int folder_file = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_file < 0)
        return 0;
    flock(folder_file, LOCK_EX);
    int count = scandir(path, &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        if (!found && names[i]->d_name[0] != '.') {
            snprintf(fault->path, sizeof fault->path, "%s/%s", path, names[i]->d_name);
            found = fault_due(fault, call, pid, when);
        }
        free(names[i]);
    }
    if (count >= 0)
        free(names);
    close(folder_file);
    return found;
}

/* One line: SECONDS CALLER CALL PID WHAT RESULT, where WHAT is `begin`, `end`, or a fault's action. */
void call_log(const char *folder, const char *call, pid_t pid, const char *what, int result)
{
    char path[PATH_SIZE + 16], line[160];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(path, sizeof path, "%s/calls.log", folder);
    int length = snprintf(line, sizeof line, "%ld.%09ld %d %s %d %s %d\n", now.tv_sec, now.tv_nsec, getpid(), call,
                          pid, what, result);
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (file >= 0) {
        if (write(file, line, length) < 0)
            perror(path);
        close(file);
    }
}

/* Suffer what is due here: returns 1 when the call ends with *result, 2 when the process shall be made FAILED first. */
int fault_suffer(const char *folder, const char *call, pid_t pid, const char *when, CUresult *result)
{
    struct fault fault;
    if (!fault_take(folder, call, pid, when, &fault))
        return 0;
    call_log(folder, call, pid, fault.action, fault.value);
    if (!strcmp(fault.action, "delay"))
        sleep_ms(fault.value);
    while (!strcmp(fault.action, "hang") && !access(fault.path, F_OK))
        sleep_ms(2);
    if (!strcmp(fault.action, "die"))
        kill(getpid(), SIGKILL);
    *result = fault.value;
    return !strcmp(fault.action, "error") ? 1 : !strcmp(fault.action, "fail") ? 2 : 0;
}
