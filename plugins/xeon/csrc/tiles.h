// AMX tiles: eight registers of up to 16 rows of 64 bytes, and the products of two of them. Two implementations of the same few
// calls: the instructions, and with EMULATE_AVX512 a plain one with the semantics that Intel's manual gives them, for tests on
// CPUs without AMX. For isa_*.cpp only, below their target pragma.
//
//   configure({{0, 16, 64}, ...})     tile, rows, bytes of a row; zeroes all tiles
//   load<T>(p, stride) / store<T>     rows are `stride` bytes apart
//   dot_bf16<C, A, B>                 C[m][n] += sum over k of A[m][2k, 2k + 1] . B[k][2n, 2n + 1], A and B bf16, C float32
//   dot_u8s8<C, A, B>                 C[m][n] += sum over k of A[m][4k..] . B[k][4n..], A uint8, B int8, C int32
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_xeon {
namespace tiles {
namespace {  // each file that includes this is built for another target

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t bytes) { rows[tile] = uint8_t(num_rows), row_bytes[tile] = uint16_t(bytes); }
};
static_assert(sizeof(Config) == 64, "what LDTILECFG reads");

#ifdef EMULATE_AVX512

struct Emulated {
  Config config;
  uint8_t data[8][16][64];
};
inline Emulated& emulated() {
  static thread_local Emulated state;
  return state;
}

inline void configure(const Config& config) {
  emulated().config = config;
  __builtin_memset(emulated().data, 0, sizeof emulated().data);
}
inline void release() { emulated().config = Config{}; }

template <int T>
void zero() {
  __builtin_memset(emulated().data[T], 0, sizeof emulated().data[T]);
}

template <int T>
void load(const void* p, int64_t stride) {
  Emulated& e = emulated();
  zero<T>();  // what lies past the configured rows and bytes reads as zeros
  for (int r = 0; r < e.config.rows[T]; ++r)
    __builtin_memcpy(e.data[T][r], static_cast<const char*>(p) + r * stride, e.config.row_bytes[T]);
}

template <int T>
void store(void* p, int64_t stride) {
  Emulated& e = emulated();
  for (int r = 0; r < e.config.rows[T]; ++r)
    __builtin_memcpy(static_cast<char*>(p) + r * stride, e.data[T][r], e.config.row_bytes[T]);
}

// Subnormals are zeros, going in and coming out.
inline float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }
inline float bf16_at(const uint8_t* p) {
  uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return flushed(x);
}

// The even and the odd k are summed apart, with one rounding a product, and then added to C.
template <int C, int A, int B>
void dot_bf16() {
  Emulated& e = emulated();
  for (int m = 0; m < e.config.rows[C]; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < e.config.row_bytes[A] / 4; ++k) {
      for (int n = 0; n < e.config.row_bytes[C] / 4; ++n) {
        const uint8_t *a = e.data[A][m] + 4 * k, *b = e.data[B][k] + 4 * n;
        even[n] = flushed(__builtin_fmaf(bf16_at(a), bf16_at(b), even[n]));
        odd[n] = flushed(__builtin_fmaf(bf16_at(a + 2), bf16_at(b + 2), odd[n]));
      }
    }
    for (int n = 0; n < e.config.row_bytes[C] / 4; ++n) {
      float c;
      __builtin_memcpy(&c, e.data[C][m] + 4 * n, 4);
      c = flushed(flushed(c) + flushed(even[n] + odd[n]));
      __builtin_memcpy(e.data[C][m] + 4 * n, &c, 4);
    }
  }
}

template <int C, int A, int B>
void dot_u8s8() {
  Emulated& e = emulated();
  for (int m = 0; m < e.config.rows[C]; ++m) {
    for (int n = 0; n < e.config.row_bytes[C] / 4; ++n) {
      uint32_t c;
      __builtin_memcpy(&c, e.data[C][m] + 4 * n, 4);
      for (int k = 0; k < e.config.row_bytes[A]; ++k)
        c += uint32_t(int32_t(e.data[A][m][k]) * int32_t(int8_t(e.data[B][k / 4][4 * n + k % 4])));
      __builtin_memcpy(e.data[C][m] + 4 * n, &c, 4);
    }
  }
}

#else

inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { asm volatile("tilerelease" ::); }

// Of AT&T operands the last is the destination. Registers are named by number, which an asm takes as a constant.
template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif
}  // namespace
}  // namespace tiles
}  // namespace sglang_xeon
