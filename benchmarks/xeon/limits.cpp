// The machine's limits: read bandwidth and float32 FMA rate of `threads` threads, each on its own data. Built by kernels.py.
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512F__
typedef float vf __attribute__((vector_size(64)));
#else
typedef float vf __attribute__((vector_size(32)));
#endif

static double seconds_of(int threads, void (*work)(int, void*), void* arg) {
  auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(work, i, arg);
  for (auto& t : all) t.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Buffer {
  char* data;
  size_t bytes;
};

static void read_all(int i, void* arg) {
  Buffer b = *static_cast<Buffer*>(arg);
  const vf* p = reinterpret_cast<const vf*>(b.data + size_t(i) * b.bytes);
  vf sums[8] = {};
  for (size_t n = b.bytes / sizeof(vf), j = 0; j + 8 <= n; j += 8)
    for (int k = 0; k < 8; ++k) sums[k] += p[j + k];
  for (auto& s : sums) asm volatile("" ::"x"(s));
}

static const int64_t kRounds = 2000000;

// Twelve sums, so that two FMAs a cycle never wait for one another. Named one by one: an array would go through memory.
static void multiply(int, void*) {
  vf a = vf{} + 0.999f, b = vf{} + 0.001f;
  vf s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  for (int64_t i = 0; i < kRounds; ++i) {
#define STEP(s) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(s) : "x"(a), "x"(b));
    STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7) STEP(s8) STEP(s9) STEP(s10) STEP(s11)
#undef STEP
  }
}

extern "C" double read_bandwidth(int threads, int repeats) {  // bytes a second, best of repeats
  Buffer b{nullptr, size_t(256) << 20};
  b.data = static_cast<char*>(std::aligned_alloc(2 << 20, b.bytes * size_t(threads)));
  madvise(b.data, b.bytes * size_t(threads), MADV_HUGEPAGE);  // as weights and pools have; from small pages it reads a third less
  std::memset(b.data, 0, b.bytes * size_t(threads));
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    double s = seconds_of(threads, read_all, &b);
    best = s < best ? s : best;
  }
  std::free(b.data);
  return double(b.bytes) * threads / best;
}

extern "C" double fma_rate(int threads, int repeats) {  // FLOPs a second, best of repeats
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    double s = seconds_of(threads, multiply, nullptr);
    best = s < best ? s : best;
  }
  return double(kRounds) * 12 * (sizeof(vf) / 4) * 2 * threads / best;
}
