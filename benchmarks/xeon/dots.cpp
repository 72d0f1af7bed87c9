// Products and sums a second of `threads` threads, operands in registers or L1: VDPBF16PS, VPDPBUSD, TDPBF16PS. 0 where the CPU that this is
// built for lacks them. Built by formats.py.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

static double seconds_of(int threads, void (*work)()) {
  auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(work);
  for (auto& t : all) t.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double rate(int threads, int repeats, void (*work)(), double each) {
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    double s = seconds_of(threads, work);
    best = s < best ? s : best;
  }
  return each * threads / best;
}

static const int64_t kRounds = 1000000;

// Twelve sums, so that none waits for another; named one by one, as an array would go through memory.
#define SUMS(T) T s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
#define ALL(STEP) \
  STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7) STEP(s8) STEP(s9) STEP(s10) STEP(s11)

#ifdef __AVX512BF16__
static void dot_bf16() {
  __m512i a = _mm512_set1_epi32(0x3f803f80);
  SUMS(__m512)
#define STEP(s) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(s) : "v"(a));
  for (int64_t i = 0; i < kRounds; ++i) { ALL(STEP) }
#undef STEP
}
extern "C" double bf16_rate(int threads, int repeats) { return rate(threads, repeats, dot_bf16, double(kRounds) * 12 * 64); }
#else
extern "C" double bf16_rate(int, int) { return 0; }
#endif

#ifdef __AVX512VNNI__
static void dot_int8() {
  __m512i a = _mm512_set1_epi8(1);
  SUMS(__m512i)
#define STEP(s) asm volatile("vpdpbusd %1, %1, %0" : "+v"(s) : "v"(a));
  for (int64_t i = 0; i < kRounds; ++i) { ALL(STEP) }
#undef STEP
}
extern "C" double int8_rate(int threads, int repeats) { return rate(threads, repeats, dot_int8, double(kRounds) * 12 * 128); }
#else
extern "C" double int8_rate(int, int) { return 0; }
#endif

#ifdef __AMX_BF16__
static void dot_tiles() {
  alignas(64) uint8_t config[64] = {1};
  alignas(64) static thread_local uint8_t operand[4096];
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
  _tile_loadconfig(config);
  // Two by two tiles of sums, four loads for four products, as a GEMM does from L1.
  for (int64_t i = 0; i < kRounds / 16; ++i) {
    _tile_loadd(4, operand, 64);
    _tile_loadd(6, operand + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, operand + 2048, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, operand + 3072, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
extern "C" double tile_bf16_rate(int threads, int repeats) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0;  // leave to use tiles
  return rate(threads, repeats, dot_tiles, double(kRounds / 16) * 4 * 16 * 16 * 64);
}
#else
extern "C" double tile_bf16_rate(int, int) { return 0; }
#endif
