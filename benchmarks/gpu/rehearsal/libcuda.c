/* What Triton asks of NVIDIA's driver, on a machine without one: modules that are not loaded, launches that launch nothing. What the driver
   refuses of a launch or of a descriptor, by its documentation, is refused here: on an H200. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, SHARED = 232448, THREADS = 1024 };
typedef int Result;

static long launches, dependent;
long num_launches(void) { return launches; }
long num_dependent(void) { return dependent; } /* that may begin before the kernel ahead has ended */

static Result refused(const char *what, uint64_t found) {
  fprintf(stderr, "refused: %s, %llu\n", what, (unsigned long long)found);
  return INVALID_VALUE;
}

Result cuGetErrorString(Result error, const char **text) { *text = error ? "invalid value" : "no error"; return OK; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return OK; }
Result cuCtxSetCurrent(void *context) { return OK; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return OK; }
Result cuCtxSetLimit(int limit, size_t value) { return OK; }
Result cuDeviceGet(int *device, int index) { *device = index; return OK; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return OK; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return OK; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return OK; }
Result cuFuncSetCacheConfig(void *function, int config) { return OK; }
Result cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return OK; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return OK; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  static const int known[][2] = {{8, 49152}, {10, 32}, {12, 65536}, {16, 132}, {75, 9}, {76, 0}, {81, 233472}, {97, SHARED}};
  *value = THREADS;
  for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i][0] == attribute) *value = known[i][1];
  return OK;
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : THREADS; return OK; }
Result cuFuncSetAttribute(void *function, int attribute, int value) {
  return value > SHARED ? refused("bytes of shared memory", value) : OK;
}

typedef struct { int name; char pad[4]; union { int on; char pad[64]; } value; } Attribute; /* CUlaunchAttribute */
typedef struct { unsigned grid[3], block[3], shared; void *stream; const Attribute *attributes; unsigned count; } Launch; /* CUlaunchConfig */
enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

Result cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
  static const uint64_t most[] = {(1u << 31) - 1, 65535, 65535};
  launches++;
  for (unsigned i = 0; i < launch->count; i++)
    dependent += launch->attributes[i].name == PROGRAMMATIC_STREAM_SERIALIZATION && launch->attributes[i].value.on;
  for (int i = 0; i < 3; i++)
    if (!launch->grid[i] || launch->grid[i] > most[i]) return refused("programs", launch->grid[i]);
  if (launch->block[0] > THREADS) return refused("threads", launch->block[0]);
  return launch->shared > SHARED ? refused("bytes of shared memory", launch->shared) : OK;
}

Result cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dims, const uint64_t *strides,
                              const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  static const int size[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  uint64_t row = (uint64_t)box[0] * size[type];
  if ((uintptr_t)address % 16) return refused("address", (uintptr_t)address);
  for (uint32_t i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32) return refused("dim", dims[i]);
    if (!box[i] || box[i] > 256) return refused("side of a box", box[i]);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return refused("stride", strides[i]);
  }
  if (row % 16 || (swizzle && row > 16u << swizzle)) return refused("bytes of a box's row", row);
  memset(map, 0, 128);
  return OK;
}
