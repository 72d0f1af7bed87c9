// KV writes and attention over pages as torch ops.

#include <cstring>
#include <limits>

#include "bindings.h"

namespace sglang_xeon {
namespace {

struct Cache {
  void *k, *v;
  DType dtype;
};

Cache cache_of(const Tensor& k_cache, const Tensor& v_cache) {
  STD_TORCH_CHECK(
      k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.is_contiguous() && v_cache.is_contiguous(),
      "sglang_xeon: KV leaves must be contiguous [N, P, Hk, D]");
  STD_TORCH_CHECK(k_cache.scalar_type() == v_cache.scalar_type(), "sglang_xeon: K and V leaves differ in dtype");
  return {k_cache.data_ptr(), v_cache.data_ptr(), dtype_of(k_cache, "KV pool")};
}

// k: [T, Hk, D], v: [T, Hk, Dv] into the leaves at slots: int32[T]
void kv_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  Cache cache = cache_of(k_cache, v_cache);
  Tensor k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  int64_t tokens = slots.numel();
  STD_TORCH_CHECK(k.size(0) >= tokens && v.size(0) >= tokens, "sglang_xeon: more slots than keys or values");
  KvWriteArgs args{rows_of(k_rows, "k"), rows_of(v_rows, "v"), cache.k, cache.v, cache.dtype, int32_of(slots, "slot_mapping"),
                   tokens, k_cache.size(2) * k_cache.size(3), v_cache.size(2) * v_cache.size(3)};
  STD_TORCH_CHECK(
      k.numel() == k.size(0) * args.k_width && v.numel() == v.size(0) * args.v_width, "sglang_xeon: k, v do not fit the pool");
  if (tokens) kernels().kv_write(args);
}

std::tuple<Tensor, Tensor> attention_lse(
    const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& slots, const Tensor& cu_extend, const Tensor& prefix_lens, const Tensor& seq_lens, const Tensor& page_table,
    const std::optional<Tensor>& sinks, double scale, double soft_cap, int64_t window, bool causal, bool want_lse) {
  if (k && v) kv_write(*k, *v, k_cache, v_cache, slots);
  Cache cache = cache_of(k_cache, v_cache);
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == k_cache.size(3), "sglang_xeon: q must be [T, Hq, D] with the pool's D");
  Tensor q_rows = with_contiguous_rows(q);
  int64_t tokens = q.size(0), heads = q.size(1), reqs = seq_lens.numel();
  STD_TORCH_CHECK(heads % k_cache.size(2) == 0, "sglang_xeon: heads do not divide over KV heads");
  STD_TORCH_CHECK(
      cu_extend.numel() == reqs + 1 && prefix_lens.numel() == reqs && page_table.dim() == 2 && page_table.size(0) == reqs,
      "sglang_xeon: plan tensors disagree on the number of reqs");
  Tensor out = empty({tokens, heads, v_cache.size(3)}, q.scalar_type());
  Tensor lse = empty({want_lse ? tokens : 0, heads}, ScalarType::Float);
  AttentionArgs args{};
  args.q = rows_of(q_rows, "q");
  args.k_cache = cache.k, args.v_cache = cache.v, args.kv_dtype = cache.dtype;
  args.out = {out.data_ptr(), args.q.dtype, heads * v_cache.size(3)};
  args.lse = want_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  Tensor sink_values;
  if (sinks) {
    sink_values = torch::stable::to(*sinks, ScalarType::Float);
    args.sinks = static_cast<const float*>(sink_values.data_ptr());
  }
  args.cu_extend = int32_of(cu_extend, "cu_extend");
  args.prefix_lens = int32_of(prefix_lens, "prefix_lens");
  args.seq_lens = int32_of(seq_lens, "seq_lens");
  args.page_table = int32_of(page_table, "page_table");
  args.num_reqs = reqs, args.num_columns = page_table.size(1), args.page_size = k_cache.size(1);
  args.num_heads = heads, args.num_kv_heads = k_cache.size(2);
  args.head_dim = k_cache.size(3), args.v_head_dim = v_cache.size(3);
  args.scale = float(scale), args.soft_cap = float(soft_cap), args.window = window, args.causal = causal;

  int64_t covered = reqs ? std::min<int64_t>(args.cu_extend[reqs], tokens) : 0;
  if (covered < tokens) {  // padding tokens belong to no req
    size_t size = args.q.dtype == DType::bf16 ? 2 : 4, width = size_t(args.out.stride) * size;
    std::memset(static_cast<char*>(out.data_ptr()) + size_t(covered) * width, 0, size_t(tokens - covered) * width);
    if (want_lse)
      std::fill(args.lse + covered * heads, args.lse + tokens * heads, -std::numeric_limits<float>::infinity());
  }
  if (covered) kernels().attention(args);
  return {out, lse};
}

Tensor attention(
    const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& slots, const Tensor& cu_extend, const Tensor& prefix_lens, const Tensor& seq_lens, const Tensor& page_table,
    const std::optional<Tensor>& sinks, double scale, double soft_cap, int64_t window, bool causal) {
  return std::get<0>(attention_lse(
      q, k, v, k_cache, v_cache, slots, cu_extend, prefix_lens, seq_lens, page_table, sinks, scale, soft_cap, window, causal,
      false));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor cu_extend, "
      "Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sinks, float scale, float soft_cap, int window, "
      "bool causal) -> Tensor");
  m.def(
      "attention_lse(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor cu_extend, "
      "Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sinks, float scale, float soft_cap, int window, "
      "bool causal, bool want_lse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("kv_write", TORCH_BOX(&kv_write));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_lse", TORCH_BOX(&attention_lse));
}

}  // namespace sglang_xeon
