/* Counts in GPU memory: a cell is advanced by a kernel, beside random bytes that must never change.
 *
 * Prints, line after line, the number and a hash of all its device memory but the cell; `ready` after the first.
 * Ends when the simulator's folder is gone.
 *   --gpu N             on this device; more than one may be named (the cell is on the first)
 *   --megabytes N       of random bytes on each device (1)     --zeros N     of zeros beside them (0), in MB
 *   --seed N            of the random bytes (1)                --managed     in managed memory (UVM)
 *   --spin MS           each step also keeps the GPU busy for so long
 *   --fork              a child is forked after cuInit; it only sleeps (it has the open devices, and no CUDA)
 *   --nvml              NVML is initialised and never shut down
 *   --patient           a failed call does not end it: it prints `failed NAME`, and only sleeps
 *   --child "OPTIONS"   a child process that does the same with these options, printing to --child-output N
 *   --output PATH       print there */
#define _GNU_SOURCE
#include "../src/cuda_api.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEP_US = 10000, MOST_DEVICES = 8, MOST_WORDS = 32 };

/* Whose test was killed before it could end us ends when the test's folder is cleared away. */
static void end_with_the_host(void)
{
    if (access(getenv("CRCLI_GPU_SIM"), F_OK))
        exit(4);
}

static int is_patient;

static void check(CUresult result, const char *what)
{
    const char *name = NULL;
    if (result) {
        cuGetErrorName(result, &name);
        if (is_patient)
            printf("failed %s\n", name ? name : "?");
        for (; is_patient; usleep(STEP_US))
            end_with_the_host();
        fprintf(stderr, "%s: %d %s\n", what, result, name ? name : "?");
        exit(3);
    }
}

struct options {
    int devices[MOST_DEVICES], device_count, managed, forks, nvml;
    size_t megabytes, zeros;
    uint64_t seed, spin;
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static void fill(CUdeviceptr memory, size_t bytes, uint64_t seed)
{
    uint64_t *words = malloc(bytes), state = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = next_random(&state);
    check(cuMemcpyHtoD_v2(memory, words, bytes), "fill");
    memset(words, 0, bytes); /* nothing of it may be found in the process's own memory */
    free(words);
}

static uint64_t hash(CUdeviceptr memory, size_t bytes, uint64_t sum)
{
    static uint64_t words[1 << 15];
    for (size_t done = 0; done < bytes; done += sizeof words) {
        size_t some = bytes - done < sizeof words ? bytes - done : sizeof words;
        check(cuMemcpyDtoH_v2(words, memory + done, some), "read");
        for (size_t i = 0; i < some / 8; i++)
            sum = (sum ^ words[i]) * 0x100000001b3u;
    }
    return sum;
}

static void start_child(char *words)
{
    char *argv[MOST_WORDS] = {"gpu_counter"};
    int count = 1;
    if (fork())
        return;
    for (char *word = strtok(words, " "); word && count < MOST_WORDS - 1; word = strtok(NULL, " "))
        argv[count++] = word;
    execv("/proc/self/exe", argv);
    _exit(127);
}

static struct options parse(int argc, char **argv)
{
    struct options options = {.megabytes = 1, .seed = 1};
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--managed"))
            options.managed = 1;
        else if (!strcmp(name, "--fork"))
            options.forks = 1;
        else if (!strcmp(name, "--patient"))
            is_patient = 1;
        else if (!strcmp(name, "--nvml"))
            options.nvml = 1;
        else if (i++, !strcmp(name, "--gpu") && options.device_count < MOST_DEVICES)
            options.devices[options.device_count++] = atoi(value);
        else if (!strcmp(name, "--megabytes"))
            options.megabytes = atoi(value);
        else if (!strcmp(name, "--zeros"))
            options.zeros = atoi(value);
        else if (!strcmp(name, "--seed"))
            options.seed = atoi(value);
        else if (!strcmp(name, "--spin"))
            options.spin = atoi(value);
        else if (!strcmp(name, "--child"))
            start_child(argv[i]);
        else if (strcmp(name, "--output") || !freopen(value, "a", stdout))
            exit(2);
    }
    options.device_count += !options.device_count;
    return options;
}

int main(int argc, char **argv)
{
    struct options options = parse(argc, argv);
    size_t bytes = options.megabytes << 20, zeros = options.zeros << 20;
    CUcontext contexts[MOST_DEVICES];
    CUdeviceptr memory[MOST_DEVICES], empty[MOST_DEVICES], cell = 0;
    CUfunction affine, spin;
    CUmodule module;
    setlinebuf(stdout);
    check(cuInit(0), "cuInit");
    for (int i = 0; i < options.device_count; i++) {
        check(cuDevicePrimaryCtxRetain(&contexts[i], options.devices[i]), "context");
        check(cuCtxSetCurrent(contexts[i]), "current");
        check(options.managed ? cuMemAllocManaged(&memory[i], bytes, 1) : cuMemAlloc_v2(&memory[i], bytes), "memory");
        fill(memory[i], bytes, options.seed + i);
        if (zeros)
            check(cuMemAlloc_v2(&empty[i], zeros), "zeros");
    }
    check(cuCtxSetCurrent(contexts[0]), "current");
    check(cuMemAlloc_v2(&cell, 8), "cell");
    check(cuMemsetD8_v2(cell, 0, 8), "cell");
    check(cuModuleLoadData(&module, ""), "module");
    check(cuModuleGetFunction(&affine, module, "affine"), "affine");
    check(cuModuleGetFunction(&spin, module, "spin"), "spin");
    if (options.nvml) {
        int (*initialise)(void) = dlsym(dlopen("libnvidia-ml.so.1", RTLD_NOW), "nvmlInit_v2");
        check(initialise(), "nvmlInit");
    }
    if (options.forks && !fork())
        for (;; usleep(STEP_US))
            end_with_the_host();
    for (int ready = 0;; ready = 1) {
        uint64_t number, sum = 0xcbf29ce484222325u, count = 1, a = 1, b = 1;
        for (int i = 0; i < options.device_count; i++) {
            sum = hash(memory[i], bytes, sum);
            sum = zeros ? hash(empty[i], zeros, sum) : sum;
        }
        check(cuMemcpyDtoH_v2(&number, cell, 8), "number");
        printf("%lu %016lx\n", number, sum);
        if (!ready)
            puts("ready");
        end_with_the_host();
        void *advance[] = {&cell, &count, &a, &b}, *busy[] = {&options.spin};
        check(cuLaunchKernel(affine, 1, 1, 1, 1, 1, 1, 0, NULL, advance, NULL), "affine");
        if (options.spin)
            check(cuLaunchKernel(spin, 1, 1, 1, 1, 1, 1, 0, NULL, busy, NULL), "spin");
        usleep(STEP_US);
    }
}
