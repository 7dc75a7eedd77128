/* The simulated host: what GPUs it has and which driver, as the file `host` of the simulator's folder says. */
#define _GNU_SOURCE
#include "board.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

const char *simulator_folder(void)
{
    const char *named = getenv("CRCLI_GPU_SIM");
    return named ? named : "/nonexistent";
}

/* One fact to a line: `driver 580.95.05`, `api 13000`, `init_ms 0`, `tells_processes 1`, `context_bytes N`,
 * `gpu UUID MINOR MEMORY COMPUTE PERSISTENCE MIG NAME…`. Returns -1 without the file: there is no driver. */
int host_read(const char *folder, struct host *host)
{
    char path[PATH_SIZE + 8], line[256];
    snprintf(path, sizeof path, "%s/host", folder);
    FILE *file = fopen(path, "re");
    memset(host, 0, sizeof *host);
    if (!file)
        return -1;
    while (fgets(line, sizeof line, file)) {
        struct gpu *gpu = &host->gpus[host->count];
        line[strcspn(line, "\n")] = 0;
        sscanf(line, "driver %31s", host->driver);
        sscanf(line, "api %d", &host->api);
        sscanf(line, "init_ms %d", &host->init_ms);
        sscanf(line, "tells_processes %d", &host->tells_processes);
        sscanf(line, "context_bytes %lu", &host->context_bytes);
        if (host->count < MAX_GPUS &&
            sscanf(line, "gpu %47s %d %lu %d.%d %d %d %63[^\n]", gpu->uuid, &gpu->minor, &gpu->memory,
                   &gpu->compute_major, &gpu->compute_minor, &gpu->persistence, &gpu->mig, gpu->name) == 8)
            host->count++;
    }
    fclose(file);
    return 0;
}

int host_find(const struct host *host, const char *uuid)
{
    for (int i = 0; i < host->count; i++)
        if (!strcmp(host->gpus[i].uuid, uuid))
            return i;
    return -1;
}

void uuid_text(const CUuuid *uuid, char text[48])
{
    char *end = text + sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++)
        end += sprintf(end, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid->bytes[i]);
}

void uuid_bytes(const char *text, CUuuid *uuid)
{
    int filled = 0;
    unsigned byte;
    memset(uuid, 0, sizeof *uuid);
    for (text += 4; *text && filled < 16; text++)
        if (*text != '-' && sscanf(text, "%2x", &byte) == 1) {
            uuid->bytes[filled++] = byte;
            text++;
        }
}

void sleep_ms(unsigned ms)
{
    struct timespec left = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}
