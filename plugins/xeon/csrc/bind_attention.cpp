// KV writes and attention as torch ops.

#include <cstring>
#include <limits>

#include "bindings.h"

namespace sglang_xeon {
namespace {

using MaybeTensor = std::optional<Tensor>;

KvDType kv_dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return KvDType::f32;
    case ScalarType::BFloat16: return KvDType::bf16;
    case ScalarType::Half: return KvDType::f16;
    case ScalarType::Float8_e4m3fn: return KvDType::fp8;
    case ScalarType::Char: return KvDType::int8;
    default: STD_TORCH_CHECK(false, "sglang_xeon: KV pools are float32, bfloat16, float16, float8_e4m3fn or int8");
  }
}

// A leaf [N, P, H, D]; scale: float32[H] with fp8, float32[N, P, H, 1] with int8.
KvStore store_of(const Tensor& leaf, const MaybeTensor& scale) {
  STD_TORCH_CHECK(leaf.dim() == 4 && leaf.is_contiguous(), "sglang_xeon: KV leaves must be contiguous [N, P, Hk, D]");
  KvStore store{leaf.data_ptr(), leaf.size(2) * leaf.size(3), leaf.size(3), nullptr, nullptr};
  KvDType dtype = kv_dtype_of(leaf);
  if (dtype != KvDType::fp8 && dtype != KvDType::int8) return store;
  bool fp8 = dtype == KvDType::fp8;
  STD_TORCH_CHECK(
      scale && scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
          scale->numel() == (fp8 ? leaf.size(2) : leaf.numel() / leaf.size(3)),
      "sglang_xeon: a pool of fp8 needs scales float32[Hk], one of int8 float32[N, P, Hk, 1]");
  auto* data = static_cast<float*>(scale->data_ptr());
  if (fp8)
    store.head_scales = data;
  else
    store.token_scales = data;
  return store;
}

// k, v: [T, H, D] or [T, D], rows contiguous, into the leaves at slots: int32[T]
KvWriteArgs write_args(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const MaybeTensor& k_scale,
    const MaybeTensor& v_scale, const Tensor& slots) {
  STD_TORCH_CHECK(k_cache.scalar_type() == v_cache.scalar_type(), "sglang_xeon: K and V leaves differ in dtype");
  int64_t tokens = slots.numel();
  STD_TORCH_CHECK(k.size(0) >= tokens && v.size(0) >= tokens, "sglang_xeon: more slots than keys or values");
  KvWriteArgs args{rows_of(k, "k"),      rows_of(v, "v"),                store_of(k_cache, k_scale), store_of(v_cache, v_scale),
                   kv_dtype_of(k_cache), int32_of(slots, "slot_mapping"), tokens,                     k_cache.size(2)};
  STD_TORCH_CHECK(
      k.numel() == k.size(0) * args.k_store.row && v.numel() == v.size(0) * args.v_store.row,
      "sglang_xeon: k, v do not fit the pool");
  return args;
}

void kv_write(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const MaybeTensor& k_scale,
    const MaybeTensor& v_scale, const Tensor& slots) {
  Tensor k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  KvWriteArgs args = write_args(k_rows, v_rows, k_cache, v_cache, k_scale, v_scale, slots);
  if (args.num_tokens) kernels().kv_write(args);
}

// q: [T, Hq, D], k: [T, Hk, D], v: [T, Hk, Dv], positions: int32[T], table: float32[L, rotary], weights: [D] -> q, normalised where
// there are weights, and rotated. k, likewise, and v go into the leaves.
Tensor rope_write(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, const Tensor& table, bool interleaved,
    const MaybeTensor& q_weight, const MaybeTensor& k_weight, double eps, const Tensor& k_cache, const Tensor& v_cache,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, const Tensor& slots) {
  Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  RopeWriteArgs args{};
  args.write = write_args(k_rows, v_rows, k_cache, v_cache, k_scale, v_scale, slots);
  STD_TORCH_CHECK(
      table.dim() == 2 && table.is_contiguous() && table.scalar_type() == ScalarType::Float && table.size(1) <= k_cache.size(3),
      "sglang_xeon: the rope table must be contiguous float32[L, rotary]");
  STD_TORCH_CHECK(
      q.dim() == 3 && q.size(2) == k_cache.size(3) && q.size(0) == args.write.num_tokens && positions.numel() == q.size(0) &&
          q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
      "sglang_xeon: q must be [T, Hq, D] with the pool's D, of the dtype of k and v, with a position and a slot a token");
  if (q_weight && k_weight) {
    STD_TORCH_CHECK(
        q_weight->numel() == q.size(2) && k_weight->numel() == q.size(2) && q_weight->is_contiguous() && k_weight->is_contiguous() &&
            q_weight->scalar_type() == k_weight->scalar_type(),
        "sglang_xeon: head norm weights must be [D], of one dtype");
    args.q_weight = q_weight->data_ptr(), args.k_weight = k_weight->data_ptr();
    args.weight_dtype = dtype_of(*q_weight, "head norm weights"), args.eps = float(eps);
  }
  Tensor out = empty({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  args.q = rows_of(q_rows, "q"), args.q_heads = q.size(1);
  args.q_out = {out.data_ptr(), args.q.dtype, q.size(1) * q.size(2)};
  args.cos_sin = static_cast<const float*>(table.data_ptr()), args.positions = int32_of(positions, "positions");
  args.rotary = table.size(1), args.interleaved = interleaved;
  if (args.write.num_tokens) kernels().rope_write(args);
  return out;
}

// The result's tensors, with zeros and -inf for tokens of no req, which come last.
std::tuple<Tensor, Tensor> attend(AttentionArgs& args, const Tensor& like, bool want_lse) {
  int64_t tokens = like.size(0), heads = args.num_heads, dim = args.v_head_dim();
  Tensor out = empty({tokens, heads, dim}, like.scalar_type());
  Tensor lse = empty({want_lse ? tokens : 0, heads}, ScalarType::Float);
  args.out = {out.data_ptr(), args.q.dtype, heads * dim};
  args.lse = want_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  int64_t covered = args.num_reqs ? std::min<int64_t>(args.cu_extend[args.num_reqs], tokens) : 0;
  if (covered < tokens) {
    cannot_replay("there are tokens of no req");
    size_t size = args.q.dtype == DType::bf16 ? 2 : 4, width = size_t(args.out.stride) * size;
    std::memset(static_cast<char*>(out.data_ptr()) + size_t(covered) * width, 0, size_t(tokens - covered) * width);
    if (want_lse) std::fill(args.lse + covered * heads, args.lse + tokens * heads, -std::numeric_limits<float>::infinity());
  }
  args.tiles = kernels().tiles;
  if (covered) kernels().attention(args);
  return {out, lse};
}

// What a plan says of the batch, and the pool's stores.
AttentionArgs paged_args(
    const Tensor& k_cache, const Tensor& v_cache, const MaybeTensor& k_scale, const MaybeTensor& v_scale, const Tensor& cu_extend,
    const Tensor& prefix_lens, const Tensor& seq_lens, const Tensor& page_table, const MaybeTensor& sharing, const MaybeTensor& tree,
    double scale) {
  int64_t reqs = seq_lens.numel();
  STD_TORCH_CHECK(
      cu_extend.numel() == reqs + 1 && prefix_lens.numel() == reqs && page_table.dim() == 2 && page_table.size(0) == reqs,
      "sglang_xeon: plan tensors disagree on the number of reqs");
  AttentionArgs args{};
  args.k = store_of(k_cache, k_scale), args.v = store_of(v_cache, v_scale);
  args.kv_dtype = kv_dtype_of(k_cache);
  args.cu_extend = int32_of(cu_extend, "cu_extend");
  args.prefix_lens = int32_of(prefix_lens, "prefix_lens");
  args.seq_lens = int32_of(seq_lens, "seq_lens");
  args.page_table = int32_of(page_table, "page_table");
  args.num_reqs = reqs, args.num_columns = page_table.size(1), args.page_size = k_cache.size(1);
  args.num_kv_heads = k_cache.size(2);
  args.scale = float(scale);
  args.causal = true;
  if (sharing) {
    STD_TORCH_CHECK(
        sharing->dim() == 2 && sharing->size(0) == 2 && sharing->size(1) == reqs, "sglang_xeon: sharing must be int32[2, R]");
    args.sharing = int32_of(*sharing, "sharing");
  }
  if (tree) args.tree = int32_of(*tree, "tree_mask"), args.tree_words = tree->size(1);
  return args;
}

std::tuple<Tensor, Tensor> attention_lse(
    const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const Tensor& k_cache, const Tensor& v_cache,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, const Tensor& slots, const Tensor& cu_extend, const Tensor& prefix_lens,
    const Tensor& seq_lens, const Tensor& page_table, const MaybeTensor& sharing, const MaybeTensor& tree, const MaybeTensor& sinks,
    double scale, double soft_cap, int64_t window, bool causal, bool want_lse) {
  if (k && v) kv_write(*k, *v, k_cache, v_cache, k_scale, v_scale, slots);
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) == k_cache.size(3), "sglang_xeon: q must be [T, Hq, D] with the pool's D");
  STD_TORCH_CHECK(q.size(1) % k_cache.size(2) == 0, "sglang_xeon: heads do not divide over KV heads");
  AttentionArgs args =
      paged_args(k_cache, v_cache, k_scale, v_scale, cu_extend, prefix_lens, seq_lens, page_table, sharing, tree, scale);
  Tensor q_rows = with_contiguous_rows(q), sink_values;
  args.q = rows_of(q_rows, "q");
  if (sinks) {
    if (sinks->scalar_type() != ScalarType::Float) cannot_replay("sinks were converted");
    sink_values = torch::stable::to(*sinks, ScalarType::Float);
    args.sinks = static_cast<const float*>(sink_values.data_ptr());
  }
  args.num_heads = q.size(1);
  args.soft_cap = float(soft_cap), args.window = window, args.causal = causal;
  return attend(args, q, want_lse);
}

Tensor attention(
    const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const Tensor& k_cache, const Tensor& v_cache,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, const Tensor& slots, const Tensor& cu_extend, const Tensor& prefix_lens,
    const Tensor& seq_lens, const Tensor& page_table, const MaybeTensor& sharing, const MaybeTensor& tree, const MaybeTensor& sinks,
    double scale, double soft_cap, int64_t window, bool causal) {
  return std::get<0>(attention_lse(
      q, k, v, k_cache, v_cache, k_scale, v_scale, slots, cu_extend, prefix_lens, seq_lens, page_table, sharing, tree, sinks, scale,
      soft_cap, window, causal, false));
}

// q_nope: [T, Hq, rank], q_pe: [T, Hq, rope dims] over leaves of latents [N, P, 1, rank] and rotated keys [N, P, 1, rope dims]
std::tuple<Tensor, Tensor> latent_attention(
    const Tensor& q_nope, const Tensor& q_pe, const MaybeTensor& c_kv, const MaybeTensor& k_pe, const Tensor& c_cache,
    const Tensor& pe_cache, const MaybeTensor& c_scale, const MaybeTensor& pe_scale, const Tensor& slots, const Tensor& cu_extend,
    const Tensor& prefix_lens, const Tensor& seq_lens, const Tensor& page_table, const MaybeTensor& sharing, const MaybeTensor& tree,
    double scale, bool want_lse) {
  if (c_kv && k_pe) kv_write(*c_kv, *k_pe, c_cache, pe_cache, c_scale, pe_scale, slots);
  STD_TORCH_CHECK(
      q_nope.dim() == 3 && q_pe.dim() == 3 && q_nope.size(2) == c_cache.size(3) && q_pe.size(2) == pe_cache.size(3) &&
          q_pe.size(0) == q_nope.size(0) && q_pe.size(1) == q_nope.size(1) && q_pe.scalar_type() == q_nope.scalar_type(),
      "sglang_xeon: q_nope, q_pe must be [T, Hq, rank] and [T, Hq, rope dims] as in the pool, of one dtype");
  STD_TORCH_CHECK(c_cache.size(2) == 1 && pe_cache.size(2) == 1, "sglang_xeon: latents have no heads");
  AttentionArgs args =
      paged_args(c_cache, pe_cache, c_scale, pe_scale, cu_extend, prefix_lens, seq_lens, page_table, sharing, tree, scale);
  Tensor nope_rows = with_contiguous_rows(q_nope), pe_rows = with_contiguous_rows(q_pe);
  args.q = rows_of(nope_rows, "q_nope"), args.q_rope = rows_of(pe_rows, "q_pe");
  args.num_heads = q_nope.size(1), args.latent = true;
  return attend(args, q_nope, want_lse);
}

// q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv], cu_q, cu_k: int32[R + 1]
std::tuple<Tensor, Tensor> ragged_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, double scale, double soft_cap,
    int64_t window, bool causal, bool want_lse) {
  STD_TORCH_CHECK(
      q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && q.size(2) == k.size(2) && k.size(1) == v.size(1) &&
          q.size(1) % k.size(1) == 0 && k.size(0) == v.size(0) && k.scalar_type() == v.scalar_type(),
      "sglang_xeon: q, k, v must be [T, Hq, D], [Tk, Hk, D], [Tk, Hk, Dv]");
  STD_TORCH_CHECK(cu_q.numel() == cu_k.numel(), "sglang_xeon: cu_q and cu_k disagree on the number of reqs");
  Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  AttentionArgs args{};
  args.q = rows_of(q_rows, "q");
  args.k = {k_rows.data_ptr(), rows_of(k_rows, "k").stride, k.size(2), nullptr, nullptr};
  args.v = {v_rows.data_ptr(), rows_of(v_rows, "v").stride, v.size(2), nullptr, nullptr};
  args.kv_dtype = kv_dtype_of(k);
  args.cu_extend = int32_of(cu_q, "cu_q"), args.cu_keys = int32_of(cu_k, "cu_k");
  args.num_reqs = cu_q.numel() - 1;
  args.num_heads = q.size(1), args.num_kv_heads = k.size(1);
  args.scale = float(scale), args.soft_cap = float(soft_cap), args.window = window, args.causal = causal;
  return attend(args, q, want_lse);
}

// o: [T, Hq, Dv], lse: float32[T, Hq] of both
std::tuple<Tensor, Tensor> merge(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  Tensor a = as_contiguous(o_a), b = as_contiguous(o_b);
  Tensor x = as_contiguous(lse_a), y = as_contiguous(lse_b);
  int64_t rows = a.size(0) * a.size(1), dim = a.size(2);
  STD_TORCH_CHECK(
      a.numel() == b.numel() && a.scalar_type() == b.scalar_type() && x.numel() == rows && y.numel() == rows &&
          x.scalar_type() == ScalarType::Float && y.scalar_type() == ScalarType::Float,
      "sglang_xeon: merge takes o: [T, Hq, Dv] of one dtype and lse: float32[T, Hq]");
  Tensor out = empty({a.size(0), a.size(1), dim}, a.scalar_type()), lse = empty({a.size(0), a.size(1)}, ScalarType::Float);
  auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  kernels().merge({dtype_of(a, "o"), a.data_ptr(), b.data_ptr(), floats(x), floats(y), out.data_ptr(), floats(lse), rows, dim});
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def(
      "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
      "Tensor slots) -> ()");
  m.def(
      "rope_write(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table, bool interleaved, Tensor? q_weight, Tensor? k_weight, "
      "float eps, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor slots) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
      "Tensor slots, Tensor cu_extend, Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sharing, Tensor? tree, "
      "Tensor? sinks, float scale, float soft_cap, int window, bool causal) -> Tensor");
  m.def(
      "attention_lse(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, "
      "Tensor(d!)? v_scale, Tensor slots, Tensor cu_extend, Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sharing, "
      "Tensor? tree, Tensor? sinks, float scale, float soft_cap, int window, bool causal, bool want_lse) -> (Tensor, Tensor)");
  m.def(
      "latent_attention(Tensor q_nope, Tensor q_pe, Tensor? c_kv, Tensor? k_pe, Tensor(a!) c_cache, Tensor(b!) pe_cache, "
      "Tensor(c!)? c_scale, Tensor(d!)? pe_scale, Tensor slots, Tensor cu_extend, Tensor prefix_lens, Tensor seq_lens, "
      "Tensor page_table, Tensor? sharing, Tensor? tree, float scale, bool want_lse) -> (Tensor, Tensor)");
  m.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, float scale, float soft_cap, int window, "
      "bool causal, bool want_lse) -> (Tensor, Tensor)");
  m.def("merge(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("kv_write", TORCH_BOX(&kv_write));
  m.impl("rope_write", TORCH_BOX(&rope_write));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_lse", TORCH_BOX(&attention_lse));
  m.impl("latent_attention", TORCH_BOX(&latent_attention));
  m.impl("ragged_attention", TORCH_BOX(&ragged_attention));
  m.impl("merge", TORCH_BOX(&merge));
}

}  // namespace sglang_xeon
