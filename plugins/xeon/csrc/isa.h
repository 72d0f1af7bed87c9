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

// Attention of every new token over its req's pages; see ops/attention.py for what it means.
struct AttentionArgs {
  Rows q;  // [T, Hq * D]
  const void* k_cache;
  const void* v_cache;
  DType kv_dtype;
  MutRows out;     // [T, Hq * Dv]
  float* lse;      // [T, Hq], may be null
  const float* sinks;  // [Hq], may be null
  const int32_t* cu_extend;  // [R + 1]
  const int32_t* prefix_lens;
  const int32_t* seq_lens;
  const int32_t* page_table;  // [R, C]
  int64_t num_reqs, num_columns, page_size;
  int64_t num_heads, num_kv_heads, head_dim, v_head_dim;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none
  bool causal;
};

struct KvWriteArgs {
  Rows k, v;  // [T, Hk * D], [T, Hk * Dv]
  void* k_cache;
  void* v_cache;
  DType kv_dtype;
  const int32_t* slots;
  int64_t num_tokens, k_width, v_width;
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

// out[i] = sum of parts[p][i] over p, in that order. `out` may be one of the parts.
struct SumArgs {
  const void* const* parts;
  int64_t num_parts;
  DType dtype;
  void* out;
  int64_t count;
};

struct Kernels {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*pack)(const PackArgs&);
  void (*attention)(const AttentionArgs&);
  void (*kv_write)(const KvWriteArgs&);
  void (*norm)(const NormArgs&);
  void (*gated)(const GatedArgs&);
  void (*rope)(const RopeArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*sum_parts)(const SumArgs&);
};

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
// For bf16 activations and weights only: all that VDPBF16PS changes.
void linear_avx512_bf16(const LinearArgs& args);

}  // namespace sglang_xeon
