// What the kernels of every ISA level look like to library.cpp: plain argument structs and one table of functions a level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_xeon {

enum class DType : int32_t { f32 = 0, bf16 = 1 };

inline constexpr int64_t kPanel = 16;  // output columns a weight panel holds

// A matrix whose rows are contiguous.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements between rows
};

struct MutRows {
  void* data;
  DType dtype;
  int64_t stride;
};

}  // namespace sglang_xeon

#include "attention.h"

namespace sglang_xeon {

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n].
// w is packed: [ceil(N / 16)][ceil(K / 2)][16][2] for bf16 (pairs of k side by side, as VDPBF16PS and TDPBF16PS read them)
// and [ceil(N / 16)][2 * ceil(K / 2)][16] for float32; the padding is zeros.
struct LinearArgs {
  Rows x;
  const void* w;
  DType w_dtype;
  const void* bias;  // may be null
  DType bias_dtype;
  MutRows out;
  int64_t m, n, k;
};

struct PackArgs {
  Rows w;  // [n, k]
  void* packed;
  int64_t n, k;
  bool unpack;  // the way back: from packed into w
};

struct NormArgs {
  Rows x;
  const void* residual;  // may be null: plain norm; rows contiguous, x's dtype
  const void* weight;
  DType weight_dtype;
  void* out;           // x's dtype, rows contiguous
  void* residual_out;  // x's dtype, rows contiguous
  int64_t rows, inner, width;  // rows of `inner` groups of `width` each; inner is 1 but for per-head norms
  int64_t inner_stride;
  float eps;
};

enum class Gate : int32_t { silu = 0, gelu = 1, gelu_tanh = 2 };

struct GatedArgs {
  Rows x;  // [T, 2 * width]
  void* out;
  int64_t rows, width;
  Gate gate;
};

// Rotates the first `rotary` elements of each head, in place or into out.
struct RopeArgs {
  Rows x;  // [T, heads * head_dim]
  MutRows out;
  const float* cos_sin;  // [positions, rotary], cosines then sines
  const int32_t* positions;
  int64_t tokens, heads, head_dim, rotary;
  bool interleaved;  // pairs (0, 1), (2, 3), ... in place of (0, rotary / 2), ...
};

struct ArgmaxArgs {
  Rows x;
  int32_t* out;
  int64_t rows, width;
};

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*pack)(const PackArgs&);
  void (*attention)(const AttentionArgs&);
  void (*kv_write)(const KvWriteArgs&);
  void (*merge)(const MergeArgs&);
  void (*norm)(const NormArgs&);
  void (*gated)(const GatedArgs&);
  void (*rope)(const RopeArgs&);
  void (*argmax)(const ArgmaxArgs&);
};

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
// For bf16 activations and weights only: all that VDPBF16PS changes.
void linear_avx512_bf16(const LinearArgs& args);
void attention_avx512_bf16(const AttentionArgs& args);

}  // namespace sglang_xeon
