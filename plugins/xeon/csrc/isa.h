// What the kernels of every ISA level look like to library.cpp: plain argument structs and one table of functions a level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sglang_xeon {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

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

// What a weight is made of. sglang_core/ops/formats.py says what each code stands for.
enum class Element : int32_t { f32 = 0, bf16 = 1, f16 = 2, int4 = 3, int4_zero = 4, e2m1 = 5, fp8 = 6, int8 = 7, bf16_coded = 8 };
inline constexpr int64_t kNumElements = 9;
enum class ScaleType : int32_t { f32 = 0, e8m0 = 1, e4m3 = 2, bf16 = 3, f16 = 4 };

// k that lie side by side in a panel, and the bytes of all its 16 columns over so many k.
inline constexpr int64_t unit_of(Element e) {
  return e <= Element::f16 ? 2 : e <= Element::e2m1 || e == Element::bf16_coded ? 8 : 4;
}
inline constexpr int64_t unit_bytes(Element e) { return e == Element::f32 ? 128 : e == Element::bf16_coded ? 192 : 64; }

// A packed weight [n, k]: panels of 16 columns, [ceil(n / 16)][k_padded / unit][unit_bytes]; the padding is zeros.
//   f32   [2][16]: one k after the other                  bf16  [16][2]: pairs, as VDPBF16PS and TDPBF16PS read them
//   f16   [2][16]: one k after the other                  int8  [16][4]: quads, as VPDPBUSD and TDPBUSD read them
//   fp8   [16][4], the bytes of a column in the order k0, k2, k1, k3: k0 and k1 are the low bytes of two 16-bit words
//   4-bit [16] words of 32 bits: k = 2i in bits 4i.., k = 2i + 1 in bits 16 + 4i..: a shift gives a pair
//   bf16_coded: see exponents.h
struct Weight {
  Element element;
  const void* codes;
  const void* scales;         // scale_type[panels][groups][16], or null: no scale by group
  ScaleType scale_type;
  const uint8_t* zeros;       // [panels][groups][16], for int4_zero
  const float* column_scale;  // [panels * 16], or null
  const int32_t* column_sum;  // [panels * 16], for int8: the sum of a column's codes
  const int32_t* order;       // [k_padded]: the column of x at each k, -1 for none; null: as they come
  const int32_t* bounds;      // [groups + 1]: where groups begin in k, where they are of unequal length
  const uint8_t* tables;      // [panels][16], for bf16_coded: upper bytes by code
  const int32_t* starts;      // [panels + 1], for bf16_coded: where each panel's escapes begin
  const void* escapes;        // Escape[starts[panels]], of exponents.h
  int64_t n, k, k_padded;
  int64_t group, groups;      // k that share scales and zeros, and how many such groups there are
};

// What becomes of activations before the product: `activation` of a Fmt.
enum class Quantize : int32_t {
  as_is = 0, fp8 = 1, fp8_static = 2, fp8_block = 3, int8 = 4, int8_asym = 5, nvfp4 = 6, nvfp4_static = 7
};

// A product on AMX tiles: c[r, panel * 16 + j] (+)= sum over k of a[r, k] * w[panel, k, j]. bf16 pairs into float32, or quads of
// uint8 activations and int8 weights into int32. Past `units`, up to a multiple of 64 bytes, a's rows hold finite numbers.
struct TileBlock {
  const void* a;
  int64_t a_stride;  // bytes
  const void* w;
  int64_t panel_bytes, units;  // 64 bytes each
  void* c;
  int64_t c_stride;  // elements
  int64_t rows, panels;
  bool add;
};
struct TileKernels {
  void (*bf16)(const TileBlock&);
  void (*int8)(const TileBlock&);
};
extern const TileKernels kTileKernels;
// Asks the kernel for leave to use tiles, for every thread of this process. False where it refuses.
bool allow_tiles();

enum class Gate : int32_t { none = -1, silu = 0, gelu = 1, gelu_tanh = 2 };

// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n], x quantised first. out is y, or with a gate act(y[m, j]) * y[m, n / 2 + j].
struct LinearArgs {
  Rows x;
  Weight w;
  Quantize quantize;
  const float* x_scale;  // [1], where the checkpoint brings it
  const void* bias;      // may be null
  DType bias_dtype;
  Gate gate;
  MutRows out;
  int64_t m;
  const TileKernels* tiles;  // AMX's, which sum in another order than the other kernels; null: not to be used
};

// Codes [n, k] in the order of a panel. 4-bit codes come two a byte, the even k in the low nibble.
struct PackArgs {
  Element element;
  void* w;         // [n, row_bytes]
  int64_t row_bytes;
  void* packed;
  const int32_t* order;  // as in Weight
  int64_t n, k, k_padded;
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
  Rows gate;  // its silu multiplies the norm as it was rounded; no data: plain norm; x's dtype, groups as x has them
  int64_t gate_inner_stride;
  float eps;
};

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

// A stack of packed weights, one an expert.
struct ExpertStack {
  Weight first;  // the others' tensors follow its own
  Quantize quantize;
  const float* x_scale;  // [experts], where the checkpoint brings them
  const void* bias;      // [experts, n], may be null
  DType bias_dtype;
};

// out[t] = sum over k of weights[t, k] * (w2 act(w13 x[t])) of expert ids[t, k]; see ops/moe.py.
struct ExpertsArgs {
  Rows x;  // [T, hidden]
  ExpertStack w13, w2;
  const float* weights;       // [T, top_k]
  const int32_t* ids;         // [T, top_k]
  const int32_t* expert_map;  // [map_size], may be null
  int64_t map_size;
  MutRows out;  // [T, hidden], x's dtype
  int64_t tokens, top_k, num_experts, hidden, width;
  Gate gate;
  bool clamped;  // swiglu_clamped: gate is not looked at
  float alpha, limit;
  bool weight_on_input;
  const TileKernels* tiles;  // as in LinearArgs
};

// The first sizes[0] rows of x times w[0], the next sizes[1] times w[1], ...; zeros for the rows past their sum.
struct GroupedArgs {
  Rows x;
  ExpertStack w;
  const int32_t* sizes;
  MutRows out;  // x's dtype
  int64_t rows, num_experts;
  const TileKernels* tiles;  // as in LinearArgs
};

// out[t] = y[t] + B scale A x[t] with the A and B of token_adapter[t], or y[t] where that is -1; see ops/lora.py.
struct LoraArgs {
  Rows y, x;  // [T, width], [T, in]; x is of `dtype`
  const void* a;  // [adapters, num_parts * rank, in]
  const void* b;  // [adapters, width, rank]
  DType dtype;    // of x, a and b
  const int32_t* token_adapter;
  const float* scale;    // [adapters, num_parts]
  const int64_t* parts;  // [num_parts]: outputs of each
  MutRows out;           // y's dtype
  int64_t tokens, adapters, num_parts, rank, in, width;
};

// One id a row; see ops/sampling.py.
struct SampleArgs {
  Rows logits;
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k, *seeds, *positions;
  int32_t* out;
  int64_t rows, width;
  float greedy_below;  // the temperature under which a row takes its likeliest token
  bool needs_filter;   // else no row has a top-k, top-p or min-p
};

struct MaskArgs {
  Rows logits;
  const int32_t* bits;  // [rows, ceil(width / 32)]
  MutRows out;          // logits' dtype
  int64_t rows, width;
};

// out = logits in float32, then the entries' changes.
struct AdjustArgs {
  Rows logits;
  const int32_t *row, *id;  // [entries]
  const float *repetition, *add;
  float* out;
  int64_t rows, width, entries;
};

struct SoftCapArgs {
  Rows logits;
  float* out;
  int64_t rows, width;
  float cap;
};

struct LayerNormArgs {
  Rows x;
  const void *weight, *bias;  // bias may be null
  DType weight_dtype, bias_dtype;
  void* out;  // x's dtype, rows contiguous
  int64_t rows, width;
  float eps;
};

struct EmbedArgs {
  const int32_t* ids;
  const char* table;
  char* out;
  int64_t tokens, first_id, num_ids, row_bytes;
};

enum class Scoring : int32_t { softmax = 0, sigmoid = 1, softmax_after_top_k = 2 };

// See ops/moe.py.
struct RouteArgs {
  Rows logits;        // [T, num_experts]
  const float* bias;  // [num_experts], may be null
  float* weights;     // [T, top_k]
  int32_t* ids;       // [T, top_k]
  int64_t tokens, num_experts, top_k, num_groups, top_groups;
  Scoring scoring;
  bool best_two, renormalize;  // best_two: a group's score is the sum of its best two
  float scale;
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
  void (*rope_write)(const RopeWriteArgs&);
  void (*merge)(const MergeArgs&);
  void (*norm)(const NormArgs&);
  void (*gated)(const GatedArgs&);
  void (*rope)(const RopeArgs&);
  void (*argmax)(const ArgmaxArgs&);
  void (*experts)(const ExpertsArgs&);
  void (*grouped)(const GroupedArgs&);
  void (*route)(const RouteArgs&);
  void (*lora)(const LoraArgs&);
  void (*sample)(const SampleArgs&);
  void (*mask)(const MaskArgs&);
  void (*adjust)(const AdjustArgs&);
  void (*soft_cap)(const SoftCapArgs&);
  void (*layer_norm)(const LayerNormArgs&);
  void (*embed)(const EmbedArgs&);
  void (*sum_parts)(const SumArgs&);
  const TileKernels* tiles = nullptr;  // where this level has AMX
};

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
// For bf16 activations: all that VDPBF16PS and VPDPBUSD change.
void linear_avx512_bf16(const LinearArgs& args);
void experts_avx512_bf16(const ExpertsArgs& args);
void grouped_avx512_bf16(const GroupedArgs& args);
void attention_avx512_bf16(const AttentionArgs& args);
// Whether they take these.
inline bool dots_pairs(DType x, const Weight& w, Quantize quantize) {
  // What activations are quantised to is exact in bf16.
  return (x == DType::bf16 || quantize != Quantize::as_is) && w.element != Element::f32 && w.element != Element::f16;
}
inline bool dots_pairs(const LinearArgs& args) { return dots_pairs(args.x.dtype, args.w, args.quantize); }

}  // namespace sglang_xeon
