/* A CUDA runtime that runs nothing: it hands every launch to Python. Linked with the object file that the DSL exports for
   a launcher, and with the DSL's own dialect runtime, so that the real host code computes grids, sizes and parameters.
   What the object needs of TVM-FFI (the stream, errors) is here too; there is no stream, and errors are kept as text. */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } Dim3;
typedef struct {
    int id;
    char padding[4];
    union { char bytes[64]; Dim3 dim; int value; } v;
} Attribute;
typedef struct { Dim3 grid, block; size_t shared; void *stream; const Attribute *attributes; unsigned count; } Config;
enum { COOPERATIVE = 2, CLUSTER_DIMENSION = 4 }; /* cudaLaunchAttributeID */
enum { NOT_SUPPORTED = 801 };

/* geometry: grid, block, shared bytes, cluster, cooperative. */
typedef int (*Callback)(const char *kernel, const unsigned *geometry, void **arguments);
static Callback on_launch;
static char error[2048];

void ptxemu_on_launch(Callback callback) { on_launch = callback; }
const char *ptxemu_error(void) { return error; }

/* launches */
int cudaLaunchKernelExC(const Config *c, const void *kernel, void **arguments) {
    unsigned geometry[11] = {c->grid.x, c->grid.y, c->grid.z, c->block.x, c->block.y, c->block.z, (unsigned)c->shared, 1, 1, 1, 0};
    for (unsigned k = 0; k < c->count; k++) {
        const Attribute *a = &c->attributes[k];
        if (a->id == CLUSTER_DIMENSION) geometry[7] = a->v.dim.x, geometry[8] = a->v.dim.y, geometry[9] = a->v.dim.z;
        if (a->id == COOPERATIVE) geometry[10] = (unsigned)a->v.value;
    }
    return on_launch ? on_launch(kernel, geometry, arguments) : NOT_SUPPORTED;
}

/* modules: a library is nothing, a kernel is its name */
int cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    (void)code, (void)a, (void)b, (void)n, (void)c, (void)d, (void)m;
    *library = calloc(1, 8);
    return 0;
}
int cudaLibraryUnload(void *library) { free(library); return 0; }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { (void)library; *kernel = strdup(name); return 0; }
int cudaLibraryGetKernelCount(unsigned *count, void *library) { (void)library; *count = 1; return 0; }
int cudaFuncSetAttribute(const void *f, int attribute, int value) { (void)f, (void)attribute, (void)value; return 0; }
int cudaKernelSetAttributeForDevice(void *k, int attribute, int value, int device) { (void)k, (void)attribute, (void)value, (void)device; return 0; }

/* the device: as large as an H100 in what host code asks for */
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { (void)device; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13040; return 0; }
int cudaGetLastError(void) { return 0; }
static int device_attribute(int attribute) {
    switch (attribute) {
    case 1: return 1024;    /* threads a block */
    case 8: return 49152;   /* shared memory a block */
    case 10: return 32;     /* warp size */
    case 16: return 132;    /* multiprocessors */
    case 75: return 9;      /* compute capability, major */
    case 95: case 120: return 1; /* cooperative launch, clusters */
    case 97: return 232448; /* shared memory a block, opt-in */
    default: return 0;
    }
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = device_attribute(attribute); return 0; }
const char *cudaGetErrorName(int code) { return code ? "error of the emulated runtime" : "cudaSuccess"; }
const char *cudaGetErrorString(int code) { return cudaGetErrorName(code); }

/* memory is the host's */
int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(256, (n + 255) & ~(size_t)255); return *p ? 0 : 2; }
int cudaMallocAsync(void **p, size_t n, void *stream) { (void)stream; return cudaMalloc(p, n); }
int cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
int cudaMallocManaged(void **p, size_t n, unsigned flags) { (void)flags; return cudaMalloc(p, n); }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeAsync(void *p, void *stream) { (void)stream; return cudaFree(p); }
int cudaFreeHost(void *p) { return cudaFree(p); }
int cudaMemcpy(void *d, const void *s, size_t n, int kind) { (void)kind; memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int kind, void *stream) { (void)stream; return cudaMemcpy(d, s, n, kind); }
int cudaMemset(void *d, int value, size_t n) { memset(d, value, n); return 0; }
int cudaMemsetAsync(void *d, int value, size_t n, void *stream) { (void)stream; return cudaMemset(d, value, n); }

/* the driver: only what reads attributes; DSL host code writes tensor maps itself */
static int driver_kernel_attribute(int *value, int attribute, void *kernel, int device) { (void)attribute, (void)kernel, (void)device; *value = 0; return 0; }
static int driver_device_attribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
static int driver_device(int *device, int ordinal) { *device = ordinal; return 0; }
static int driver_nothing(void) { return NOT_SUPPORTED; }
int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags, int *found) {
    (void)version, (void)flags;
    if (found) *found = 0;
    void (*f)(void) = (void (*)(void))driver_nothing;
    if (!strcmp(symbol, "cuKernelGetAttribute")) f = (void (*)(void))driver_kernel_attribute;
    else if (!strcmp(symbol, "cuDeviceGetAttribute")) f = (void (*)(void))driver_device_attribute;
    else if (!strcmp(symbol, "cuDeviceGet")) f = (void (*)(void))driver_device;
    else if (!strcmp(symbol, "cuLibraryLoadData")) f = (void (*)(void))cudaLibraryLoadData;
    else if (!strcmp(symbol, "cuLibraryGetKernel")) f = (void (*)(void))cudaLibraryGetKernel;
    memcpy(function, &f, sizeof f);
    return 0;
}

/* waiting for nothing always succeeds */
#define DONE(name) int name(void) { return 0; }
DONE(cudaDeviceSynchronize) DONE(cudaStreamSynchronize) DONE(cudaStreamWaitEvent) DONE(cudaStreamCreate) DONE(cudaStreamDestroy)
DONE(cudaEventCreate) DONE(cudaEventCreateWithFlags) DONE(cudaEventDestroy) DONE(cudaEventRecord) DONE(cudaEventRecordWithFlags)
DONE(cudaEventQuery) DONE(cudaEventSynchronize) DONE(cudaProfilerStart) DONE(cudaProfilerStop)
/* what a launcher has no business to call here */
#define REFUSED(name) int name(void) { return NOT_SUPPORTED; }
REFUSED(cudaEventElapsedTime) REFUSED(cudaGetDeviceProperties) REFUSED(cudaStreamAddCallback) REFUSED(cudaStreamBeginCapture)
REFUSED(cudaStreamEndCapture) REFUSED(cudaGraphAddKernelNode) REFUSED(cudaGraphCreate) REFUSED(cudaGraphDestroy)
REFUSED(cudaGraphExecDestroy) REFUSED(cudaGraphInstantiate) REFUSED(cudaGraphKernelNodeGetAttribute)
REFUSED(cudaGraphKernelNodeSetAttribute) REFUSED(cudaGraphLaunch) REFUSED(cudaMemcpy3D) REFUSED(cudaMemcpy3DAsync)
REFUSED(cudaLibraryGetGlobal) REFUSED(cudaLibraryGetManaged) REFUSED(cudaLibraryGetUnifiedFunction) REFUSED(cudaLibraryLoadFromFile)
REFUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)

/* TVM-FFI */
void *TVMFFIEnvGetStream(int32_t type, int32_t device) { (void)type, (void)device; return NULL; }
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    size_t used = (size_t)snprintf(error, sizeof error, "%s: ", kind);
    for (int32_t k = 0; k < count && used < sizeof error; k++)
        if (parts[k]) used += (size_t)snprintf(error + used, sizeof error - used, "%s", parts[k]);
}
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1); }
void CuteDSLRT_TVMFFISetRaisedCudaError(int code) { snprintf(error, sizeof error, "the emulated CUDA runtime returned %d", code); }
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(int code) { CuteDSLRT_TVMFFISetRaisedCudaError(code); }
