// Sum over the GPUs of one host that reach each other's memory (NVLink), for tensors too small for NCCL's rings to pay.
//
// Each rank has a region that all others have mapped: flags, then two pairs of slots that calls take in turn. Call n:
//
//   one shot    copy x into the own slot; say so to all ranks; wait for all; sum their slots in rank order.
//   two shots   the same, but sum one part in `size` of it into the own result; say so and wait again; collect the parts.
//
// Flags hold the number of the call and only grow. A block speaks to and waits for the blocks of its own number alone: those have touched the
// same elements. Writers release and readers acquire, both at the scope of the system.
//
// Why two slots are enough: slot n % 2 is written again in call n + 2. A rank starts that after its call n + 1, in which a block of it has waited
// for every rank to say n + 1; which a rank says after its call n, a kernel before in its stream, has read all that it reads. (Two shots alone
// would do with one: all have summed before any goes on. Calls of one shot stand between them.)
//
// Sums are float32, in rank order, rounded once: the same bits on every rank, and for one shot and two. The number of a call lives on the device,
// so that a captured graph counts its replays. tests/all_reduce_model.py is this file as steps, under a scheduler that tries to break it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 32;  // all of them must be on the device at once, beside whatever else runs there
constexpr int kThreads = 512;

struct Flags {
  // [stage][block][rank that speaks]: each rank writes into its own place in everybody's region.
  uint32_t said[2][kMaxBlocks][kMaxRanks];
  uint32_t calls;     // that are over; of this rank alone
  uint32_t finished;  // blocks of the call under way
};
constexpr int64_t kHeader = (sizeof(Flags) + 255) / 256 * 256;

struct Peers {
  char* region[kMaxRanks];
};

__device__ void say(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ uint32_t heard(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// All of this block's writes are seen by the blocks of its number, and theirs by it. Thread r speaks to rank r and waits for it.
__device__ void meet(const Peers& peers, int stage, int rank, int size, uint32_t call) {
  __syncthreads();
  if (threadIdx.x < size) {
    auto* theirs = reinterpret_cast<Flags*>(peers.region[threadIdx.x]);
    auto* ours = reinterpret_cast<Flags*>(peers.region[rank]);
    __threadfence_system();  // the other threads' writes too, which the barrier has put before this
    say(&theirs->said[stage][blockIdx.x][rank], call);
    const uint32_t* flag = &ours->said[stage][blockIdx.x][threadIdx.x];
    while (int32_t(heard(flag) - call) < 0) {
    }
  }
  __syncthreads();
}

template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <typename T>
__device__ Vector<T> load(const char* at, int64_t i) {
  // Volatile: another device wrote it, and a cached line of call n - 2 would be read in its place.
  const volatile uint4* from = reinterpret_cast<const volatile uint4*>(at) + i;
  uint4 raw;
  raw.x = from->x, raw.y = from->y, raw.z = from->z, raw.w = from->w;
  return *reinterpret_cast<Vector<T>*>(&raw);
}

template <typename T>
__device__ void store(char* at, int64_t i, const Vector<T>& v) {
  reinterpret_cast<uint4*>(at)[i] = *reinterpret_cast<const uint4*>(&v);
}

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float& y, float x) { y = x; }
__device__ void narrow(__half& y, float x) { y = __float2half_rn(x); }
__device__ void narrow(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

template <typename T>
__device__ Vector<T> sum(const Peers& peers, int64_t offset, int size, int64_t i) {
  constexpr int n = Vector<T>::kSize;
  float total[n] = {};
  for (int r = 0; r < size; ++r) {
    const Vector<T> part = load<T>(peers.region[r] + offset, i);
    for (int j = 0; j < n; ++j) total[j] = r == 0 ? widen(part.value[j]) : total[j] + widen(part.value[j]);
  }
  Vector<T> rounded;
  for (int j = 0; j < n; ++j) narrow(rounded.value[j], total[j]);
  return rounded;
}

__device__ uint32_t begin(const Peers& peers, int rank) {
  return reinterpret_cast<Flags*>(peers.region[rank])->calls + 1;
}

// The last block to end counts the call: the others have read the number by then.
__device__ void end(const Peers& peers, int rank) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto* own = reinterpret_cast<Flags*>(peers.region[rank]);
  if (atomicAdd(&own->finished, 1) == gridDim.x - 1) {
    own->finished = 0;
    own->calls += 1;
  }
}

// count: vectors of 16 bytes. A stripe is what one block takes of a range.
template <typename T>
__global__ void __launch_bounds__(kThreads) one_shot(
    const __grid_constant__ Peers peers, int rank, int size, const char* x, char* y, int64_t count, int64_t slot_bytes) {
  const uint32_t call = begin(peers, rank);
  const int64_t slot = kHeader + (call % 2) * slot_bytes;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = first; i < count; i += step) store(peers.region[rank] + slot, i, load<T>(x, i));
  meet(peers, 0, rank, size, call);
  for (int64_t i = first; i < count; i += step) store(y, i, sum<T>(peers, slot, size, i));
  end(peers, rank);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) two_shot(
    const __grid_constant__ Peers peers, int rank, int size, const char* x, char* y, int64_t count, int64_t slot_bytes) {
  const uint32_t call = begin(peers, rank);
  const int64_t slot = kHeader + (call % 2) * slot_bytes, result = slot + 2 * slot_bytes;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  const int64_t part = (count + size - 1) / size;
  // Part by part, so that a block copies what the blocks of its number will sum, whichever rank they are of.
  for (int p = 0; p < size; ++p)
    for (int64_t i = first; i < part && p * part + i < count; i += step)
      store(peers.region[rank] + slot, p * part + i, load<T>(x, p * part + i));
  meet(peers, 0, rank, size, call);
  for (int64_t i = first; i < part && rank * part + i < count; i += step)
    store(peers.region[rank] + result, i, sum<T>(peers, slot, size, rank * part + i));
  meet(peers, 1, rank, size, call);
  for (int p = 0; p < size; ++p)
    for (int64_t i = first; i < part && p * part + i < count; i += step)
      store(y, p * part + i, load<T>(peers.region[p] + result, i));
  end(peers, rank);
}

template <typename T>
cudaError_t launch(
    const Peers& peers, int rank, int size, const void* x, void* y, int64_t count, int64_t slot_bytes, bool two_shots,
    cudaStream_t stream) {
  const int64_t work = two_shots ? (count + size - 1) / size : count;
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  const int blocks = int(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  auto* kernel = two_shots ? two_shot<T> : one_shot<T>;
  kernel<<<blocks, kThreads, 0, stream>>>(
      peers, rank, size, static_cast<const char*>(x), static_cast<char*>(y), count, slot_bytes);
  return cudaGetLastError();
}

}  // namespace

// Plain C, called through ctypes: results are cudaError_t.
extern "C" {

int64_t all_reduce_region_bytes(int64_t slot_bytes) { return kHeader + 4 * slot_bytes; }

int all_reduce_max_ranks() { return kMaxRanks; }

int all_reduce_alloc(int64_t bytes, void** region) {
  if (cudaError_t error = cudaMalloc(region, size_t(bytes))) return error;
  if (cudaError_t error = cudaMemset(*region, 0, size_t(bytes))) return error;
  return cudaDeviceSynchronize();
}

int all_reduce_free(void* region) { return cudaFree(region); }

int all_reduce_export(void* region, void* handle) {
  return cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), region);
}

int all_reduce_open(const void* handle, void** region) {
  return cudaIpcOpenMemHandle(region, *static_cast<const cudaIpcMemHandle_t*>(handle), cudaIpcMemLazyEnablePeerAccess);
}

int all_reduce_close(void* region) { return cudaIpcCloseMemHandle(region); }

const char* all_reduce_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

// regions: `size` of them. x, y: `bytes` (a multiple of 16, slot_bytes at most) on this device, aligned to 16; they may be one.
// dtype: 0 float32, 1 float16, 2 bfloat16.
int all_reduce(
    void* const* regions, int rank, int size, const void* x, void* y, int64_t bytes, int64_t slot_bytes, int dtype, int two_shots,
    void* stream) {
  Peers peers = {};
  for (int r = 0; r < size; ++r) peers.region[r] = static_cast<char*>(regions[r]);
  auto* run = dtype == 0 ? launch<float> : dtype == 1 ? launch<__half> : launch<__nv_bfloat16>;
  return run(peers, rank, size, x, y, bytes / 16, slot_bytes, two_shots != 0, static_cast<cudaStream_t>(stream));
}
}
