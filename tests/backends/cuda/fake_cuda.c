/* A driver without a GPU, for tests: libcuda.so.1 as cuda-python opens it, with the functions that refq4_cuda calls.

   Not a mock of refq4's code: all of it runs, down to cuda-python, and this is what it talks to. What the driver says
   comes from the environment; what it is asked is written to FAKE_CUDA_LOG, one line per call.

       FAKE_CUDA_VERSION   what cuDriverGetVersion tells, such as 12040
       FAKE_CUDA_DEVICES   how many GPUs (with none, cuInit says CUDA_ERROR_NO_DEVICE, as the real one does)
       FAKE_CUDA_INIT      another status for cuInit
       FAKE_CUDA_ARCH      the compute capability, such as 121 (otherwise 90)
       FAKE_CUDA_SHARED    kilobytes of shared memory that a CTA may have (otherwise 227)
       FAKE_CUDA_REGISTERS registers that a CTA may have (otherwise 65536)
       FAKE_CUDA_CAPTURING the stream that is being captured, such as 85
       FAKE_CUDA_LAUNCH    a status for cuLaunchKernel                                                            */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long from_environment(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static void told(const char *format, ...) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fclose(file);
}

static uintptr_t current = 0; /* the context; device i has 0x100 + i */

static int init(unsigned flags) {
    (void)flags;
    return from_environment("FAKE_CUDA_INIT", from_environment("FAKE_CUDA_DEVICES", 1) ? 0 : 100);
}
static int driver_version(int *version) { return *version = from_environment("FAKE_CUDA_VERSION", 13000), 0; }
static int device_count(int *count) { return *count = from_environment("FAKE_CUDA_DEVICES", 1), 0; }
static int device_get(int *device, int ordinal) { return *device = ordinal, 0; }

static int device_attribute(int *value, int attribute, int device) {
    (void)device;
    long arch = from_environment("FAKE_CUDA_ARCH", 90), shared = from_environment("FAKE_CUDA_SHARED", 227);
    switch (attribute) {
    case 75: return *value = arch / 10, 0;
    case 76: return *value = arch % 10, 0;
    case 16: return *value = 132, 0;               /* multiprocessors */
    case 97: return *value = shared << 10, 0;      /* of a CTA that asks for it */
    case 81: return *value = (shared + 1) << 10, 0; /* of a multiprocessor */
    case 12: return *value = from_environment("FAKE_CUDA_REGISTERS", 65536), 0; /* of a CTA */
    default: return 1;                             /* CUDA_ERROR_INVALID_VALUE */
    }
}

static int primary_retain(uintptr_t *context, int device) { return *context = 0x100 + device, 0; }
static int get_current(uintptr_t *context) { return *context = current, 0; }
static int push(uintptr_t context) { return told("push %lx\n", (long)context), current = context, 0; }
static int pop(uintptr_t *context) { return told("pop\n"), *context = current, current = 0, 0; }

static int module_load(uintptr_t *module, const void *image) {
    told("load %.3s\n", (const char *)image + 1); /* a cubin starts with \177ELF */
    return *module = 0x1000, 0;
}
static int get_function(uintptr_t *function, uintptr_t module, const char *name) {
    told("function %s\n", name);
    return *function = module + 1, 0;
}
static int set_attribute(uintptr_t function, int attribute, int value) {
    (void)function;
    return told("attribute %d = %d\n", attribute, value), 0;
}

static int launch(uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, uintptr_t stream, void **parameters, void **extra) {
    int whole = extra && extra[0] == (void *)1 && extra[2] == (void *)2 && !extra[4] && !parameters && function;
    char hex[2 * 4096 + 1] = "not one buffer";
    for (size_t i = 0; whole && i < *(size_t *)extra[3]; i++) sprintf(hex + 2 * i, "%02x", ((unsigned char *)extra[1])[i]);
    told("launch %u,%u,%u %u,%u,%u %u stream %lx in %lx %s\n", gx, gy, gz, bx, by, bz, shared, (long)stream,
         (long)current, hex);
    return from_environment("FAKE_CUDA_LAUNCH", 0);
}

static int allocate(uintptr_t *address, size_t size) { return told("allocate %zu\n", size), *address = 0x100000, 0; }
static int set_bytes(uintptr_t address, unsigned char value, size_t size) {
    return told("set %lx %zu x %d\n", (long)address, size, value), 0;
}
static int synchronize(uintptr_t stream) { return told("synchronize %lx\n", (long)stream), 0; }

static int is_capturing(uintptr_t stream, int *status) {
    return *status = (long)stream == from_environment("FAKE_CUDA_CAPTURING", -1), 0;
}

static int error_string(int status, const char **text) {
    return *text = status == 700 ? "an illegal memory access was encountered" : "some error", 0;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, void *status) {
    static const struct { const char *name; void *function; } table[] = {
        {"cuInit", init}, {"cuDriverGetVersion", driver_version}, {"cuDeviceGetCount", device_count},
        {"cuDeviceGet", device_get}, {"cuDeviceGetAttribute", device_attribute},
        {"cuDevicePrimaryCtxRetain", primary_retain}, {"cuCtxGetCurrent", get_current},
        {"cuCtxPushCurrent", push}, {"cuCtxPopCurrent", pop}, {"cuModuleLoadData", module_load},
        {"cuModuleGetFunction", get_function}, {"cuFuncSetAttribute", set_attribute}, {"cuLaunchKernel", launch},
        {"cuMemAlloc", allocate}, {"cuMemsetD8", set_bytes}, {"cuStreamSynchronize", synchronize},
        {"cuStreamIsCapturing", is_capturing}, {"cuGetErrorString", error_string}, {"cuGetProcAddress", cuGetProcAddress_v2},
    };
    (void)version, (void)flags, (void)status;
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) return *function = table[i].function, 0;
    return 500; /* CUDA_ERROR_NOT_FOUND */
}
