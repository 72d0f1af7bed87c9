// Arguments of the attention kernels, and the tasks they cut their work into. Included by isa.h.
#pragma once

namespace sglang_xeon {

struct TileKernels;

// What a pool stores. fp8 is e4m3fn with a scale a head; int8 has a scale for each token and head.
enum class KvDType : int32_t { f32 = 0, bf16 = 1, f16 = 2, fp8 = 3, int8 = 4 };

// One of the two stores of a layer: tokens of [heads, dim].
struct KvStore {
  void* data;
  int64_t row;                // elements from one token to the next; inside, heads follow each other
  int64_t dim;                // of a head
  const float* head_scales;   // fp8: [heads]
  float* token_scales;        // int8: [tokens, heads]
};

// Attention of every new token over its req's keys; see ops/attention.py for what it means. Keys are in pages or, where
// page_table is null, in rows [cu_keys[r], cu_keys[r + 1]).
// `latent`: k is the latents and v the rotated keys. A key is the one and then the other; its value is the latent.
struct AttentionArgs {
  Rows q;       // [T, Hq * D]; latent: [T, Hq * rank]
  Rows q_rope;  // latent: [T, Hq * rope dims]
  KvStore k, v;
  KvDType kv_dtype;
  bool latent;
  MutRows out;               // [T, Hq * Dv]
  float* lse;                // [T, Hq], may be null
  const float* sinks;        // [Hq], may be null
  const int32_t* cu_extend;  // [R + 1]
  const int32_t* prefix_lens;
  const int32_t* seq_lens;
  const int32_t* page_table;  // [R, C]
  const int32_t* cu_keys;     // [R + 1], where there are no pages
  const int32_t* sharing;     // [2, R], see attention_plan.py; null: no keys are shared
  const int32_t* tree;        // [T, tree_words], see ops/tree_mask.py; may be null
  int64_t tree_words;
  int64_t num_reqs, num_columns, page_size;
  int64_t num_heads, num_kv_heads;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none
  bool causal;
  const TileKernels* tiles;  // AMX's, for products of bf16; null: none

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t head_dim() const { return latent ? k.dim + v.dim : k.dim; }
  int64_t v_head_dim() const { return latent ? k.dim : v.dim; }
  bool scaled() const { return kv_dtype == KvDType::fp8 || kv_dtype == KvDType::int8; }
};

struct KvWriteArgs {
  Rows k, v;  // [T, heads * dim]
  KvStore k_store, v_store;
  KvDType kv_dtype;
  const int32_t* slots;
  int64_t num_tokens, num_heads;
};

// Queries and keys are normalised, where there are weights, and rotated; q goes to q_out, keys and values to their slots.
struct RopeWriteArgs {
  Rows q;         // [T, q_heads * D]
  MutRows q_out;  // q's dtype, [T, q_heads * D]
  int64_t q_heads;
  const void *q_weight, *k_weight;  // [D], null: no norm
  DType weight_dtype;
  float eps;
  const float* cos_sin;  // [positions, rotary], cosines then sines
  const int32_t* positions;
  int64_t rotary;
  bool interleaved;
  KvWriteArgs write;  // k and v are of q's dtype
};

// Two results over disjoint keys become one: [rows, dim] and [rows] each.
struct MergeArgs {
  DType dtype;
  const void *a, *b;
  const float *lse_a, *lse_b;
  void* out;
  float* lse;
  int64_t rows, dim;
};

}  // namespace sglang_xeon
