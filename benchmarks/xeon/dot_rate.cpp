// FLOPs a second of VDPBF16PS in registers, `threads` threads; 0 where the compiler's target has none. Built by attention.py.
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

static const int64_t kRounds = 2000000;

static void multiply() {
  __m512 s[12] = {};
  __m512bh a{}, b{};
  for (int64_t i = 0; i < kRounds; ++i) {
#define STEP(n) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(s[n]) : "v"(a), "v"(b));
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#undef STEP
  }
}

extern "C" double dot_rate(int threads, int repeats) {  // best of repeats
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t) all.emplace_back(multiply);
    for (auto& t : all) t.join();
    double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = s < best ? s : best;
  }
  return double(kRounds) * 12 * 32 * 2 * threads / best;
}
#else
extern "C" double dot_rate(int, int) { return 0; }
#endif
