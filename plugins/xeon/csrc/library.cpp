// The kernels as torch ops (namespace sglang_xeon), on torch's stable ABI: checks, output allocation, choice of the ISA level.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "isa.h"
#include "parallel.h"

namespace sglang_xeon {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------- threads

int64_t default_num_threads() { return torch::stable::get_num_threads(); }

namespace {

// ---------------------------------------------------------------- ISA level

Kernels make_avx512_bf16() {
  Kernels kernels = kernels_avx512;
  kernels.name = "avx512_bf16";
  kernels.linear = [](const LinearArgs& args) {
    if (args.x.dtype == DType::bf16 && args.w_dtype == DType::bf16)
      linear_avx512_bf16(args);
    else
      kernels_avx512.linear(args);
  };
  return kernels;
}

const Kernels* active = nullptr;

// `isa`: avx2, avx512 or avx512_bf16. The caller has seen that this CPU has it.
void set_isa(std::string isa) {
  static const Kernels avx512_bf16 = make_avx512_bf16();
  const Kernels* all[] = {&kernels_avx2, &kernels_avx512, &avx512_bf16};
  for (const Kernels* kernels : all)
    if (isa == kernels->name) {
      active = kernels;
      return;
    }
  STD_TORCH_CHECK(false, "sglang_xeon: no kernels for ISA '", isa, "'");
}

const Kernels& kernels() {
  STD_TORCH_CHECK(active != nullptr, "sglang_xeon: set_isa has not been called");
  return *active;
}

// Ties the calling thread to cpus[0] and thread i of its team, and of torch's pool as seen from it, to cpus[i]. Returns how
// many of torch's were tied. They exist before the caller ties itself, so none inherits its mask.
int64_t pin_threads(std::vector<int64_t> cpus) {
  int64_t threads = std::min<int64_t>(default_num_threads(), int64_t(cpus.size()));
  std::atomic<int64_t> tied{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (end - begin != 1) return;  // fewer threads than asked for: leave them free
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(size_t(cpus[size_t(begin)]), &mask);
    if (sched_setaffinity(0, sizeof(mask), &mask) == 0) tied.fetch_add(1);
  });
  pin_team(cpus.data(), int64_t(cpus.size()));
  return tied.load();
}

// ---------------------------------------------------------------- tensors

DType dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == ScalarType::Float) return DType::f32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, "sglang_xeon: ", name, " must be float32 or bfloat16");
  return DType::bf16;
}

// An uninitialised contiguous tensor on the host, without a trip through the dispatcher.
template <size_t N>
Tensor empty(const int64_t (&sizes)[N], ScalarType dtype) {
  int64_t strides[N];
  int64_t step = 1;
  for (size_t i = N; i-- > 0;) strides[i] = step, step *= sizes[i];
  int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                 : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_int32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(N), sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_as(const Tensor& like) {
  int64_t ndim = like.dim(), step = 1;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= sizes[i];
  int32_t type = like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// x, [rows, ...], with each row contiguous; copied only where it is not.
Tensor with_contiguous_rows(const Tensor& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != step) return torch::stable::contiguous(x);
    step *= x.size(i);
  }
  return x;
}

Rows rows_of(const Tensor& x, const char* name) {
  return {x.data_ptr(), dtype_of(x, name), x.size(0) > 1 ? x.stride(0) : (x.numel() / std::max<int64_t>(x.size(0), 1))};
}

const int32_t* int32_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), "sglang_xeon: ", name, " must be contiguous int32");
  return static_cast<const int32_t*>(t.data_ptr());
}

int64_t packed_size(int64_t n, int64_t k) { return (n + kPanel - 1) / kPanel * kPanel * ((k + 1) / 2 * 2); }

// ---------------------------------------------------------------- ops

// w: [n, k] -> packed: [packed_size]
Tensor pack(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 2, "sglang_xeon: a weight has two dims");
  Tensor rows = with_contiguous_rows(w);
  PackArgs args{rows_of(rows, "weight"), nullptr, w.size(0), w.size(1), false};
  Tensor packed = empty({packed_size(args.n, args.k)}, w.scalar_type());
  args.packed = packed.data_ptr();
  if (args.n && args.k) kernels().pack(args);
  return packed;
}

// The inverse: packed -> [n, k]
Tensor unpack(const Tensor& packed, int64_t n, int64_t k) {
  STD_TORCH_CHECK(packed.numel() == packed_size(n, k), "sglang_xeon: not a packed [", n, ", ", k, "] weight");
  Tensor w = empty({n, k}, packed.scalar_type());
  PackArgs args{rows_of(w, "weight"), packed.data_ptr(), n, k, true};
  if (n && k) kernels().pack(args);
  return w;
}

// x: [m, k] -> [m, n]
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, int64_t k) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == k, "sglang_xeon: linear takes [m, ", k, "]");
  STD_TORCH_CHECK(packed.numel() == packed_size(n, k), "sglang_xeon: not a packed [", n, ", ", k, "] weight");
  Tensor rows = with_contiguous_rows(x);
  Tensor out = empty({x.size(0), n}, x.scalar_type());
  LinearArgs args{rows_of(rows, "x"), packed.data_ptr(), dtype_of(packed, "weight"), nullptr, DType::f32, {}, x.size(0), n, k};
  Tensor held;
  if (bias) {
    held = torch::stable::contiguous(*bias);
    STD_TORCH_CHECK(held.numel() == n, "sglang_xeon: bias must have ", n, " elements");
    args.bias = held.data_ptr(), args.bias_dtype = dtype_of(held, "bias");
  }
  args.out = {out.data_ptr(), args.x.dtype, n};
  if (args.m && n) kernels().linear(args);
  return out;
}

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

NormArgs norm_args(const Tensor& x, const Tensor& weight, double eps) {
  NormArgs args{};
  int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(weight.numel() == x.size(last) && weight.is_contiguous(), "sglang_xeon: norm weight does not fit x");
  args.weight = weight.data_ptr(), args.weight_dtype = dtype_of(weight, "weight");
  args.width = x.size(last), args.eps = float(eps);
  return args;
}

// x: [..., M], weight: [M] -> [..., M]. Views such as the q heads of a merged qkv are read in place.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  NormArgs args = norm_args(x, weight, eps);
  bool in_place = x.dim() <= 3 && x.dim() > 1 && x.stride(x.dim() - 1) == 1;
  Tensor from = in_place ? x : torch::stable::contiguous(x);
  Tensor out = empty_as(x);
  args.x = {from.data_ptr(), dtype_of(from, "x"), in_place ? from.stride(0) : args.width};
  args.inner = in_place && x.dim() == 3 ? x.size(1) : 1;
  args.inner_stride = in_place && x.dim() == 3 ? x.stride(1) : 0;
  args.out = out.data_ptr();
  if (!x.numel()) return out;
  args.rows = x.numel() / args.width / args.inner;
  kernels().norm(args);
  return out;
}

// x, residual: [T, M] -> the norm of their rounded sum, and the sum
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  NormArgs args = norm_args(x, weight, eps);
  STD_TORCH_CHECK(
      x.dim() == 2 && residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == x.size(1) &&
          residual.scalar_type() == x.scalar_type(),
      "sglang_xeon: x and residual must be [T, M] of one dtype");
  Tensor from = with_contiguous_rows(x), other = torch::stable::contiguous(residual);
  Tensor out = empty_as(x), sum = empty_as(x);
  args.x = rows_of(from, "x"), args.residual = other.data_ptr();
  args.out = out.data_ptr(), args.residual_out = sum.data_ptr();
  args.rows = x.size(0), args.inner = 1;
  if (x.numel()) kernels().norm(args);
  return {out, sum};
}

// x: [T, 2F] -> [T, F]
Tensor gated(const Tensor& x, int64_t gate) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "sglang_xeon: gated takes [T, 2F]");
  Tensor from = with_contiguous_rows(x);
  Tensor out = empty({x.size(0), x.size(1) / 2}, x.scalar_type());
  GatedArgs args{rows_of(from, "x"), out.data_ptr(), x.size(0), x.size(1) / 2, Gate(gate)};
  if (out.numel()) kernels().gated(args);
  return out;
}

Tensor rotated(const Tensor& x, const Tensor& positions, const Tensor& table, bool interleaved) {
  Tensor from = with_contiguous_rows(x);
  Tensor out = empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  RopeArgs args{rows_of(from, "x"),
                {out.data_ptr(), dtype_of(x, "x"), x.size(1) * x.size(2)},
                static_cast<const float*>(table.data_ptr()),
                int32_of(positions, "positions"),
                x.size(0),
                x.size(1),
                x.size(2),
                table.size(1),
                interleaved};
  if (x.numel()) kernels().rope(args);
  return out;
}

// q: [T, Hq, D], k: [T, Hk, D], positions: int32[T], table: float32[L, rotary] -> q, k rotated
std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& table, bool interleaved) {
  STD_TORCH_CHECK(
      table.dim() == 2 && table.is_contiguous() && table.scalar_type() == ScalarType::Float,
      "sglang_xeon: the rope table must be contiguous float32");
  STD_TORCH_CHECK(
      q.dim() == 3 && k.dim() == 3 && positions.numel() == q.size(0) && positions.numel() == k.size(0) &&
          table.size(1) <= q.size(2) && q.size(2) == k.size(2),
      "sglang_xeon: rope takes [T, H, D] and one position a token");
  return {rotated(q, positions, table, interleaved), rotated(k, positions, table, interleaved)};
}

// x: [R, V] -> int32[R]: the lowest index of each row's largest value
Tensor argmax(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "sglang_xeon: argmax takes [R, V]");
  Tensor from = with_contiguous_rows(x);
  Tensor out = empty({x.size(0)}, ScalarType::Int);
  ArgmaxArgs args{rows_of(from, "x"), static_cast<int32_t*>(out.data_ptr()), x.size(0), x.size(1)};
  if (args.rows) kernels().argmax(args);
  return out;
}

// ids: int32[T], weight: [V, M], rows [start, start + V) of the table -> [T, M]; zeros for ids outside
Tensor embed(const Tensor& ids, const Tensor& weight, int64_t start) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "sglang_xeon: the embedding table must be contiguous");
  const int32_t* id = int32_of(ids, "ids");
  int64_t tokens = ids.numel(), size = dtype_of(weight, "weight") == DType::bf16 ? 2 : 4, bytes = weight.size(1) * size;
  Tensor out = empty({tokens, weight.size(1)}, weight.scalar_type());
  const char* rows = static_cast<const char*>(weight.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  for (int64_t t = 0; t < tokens; ++t, to += bytes) {
    int64_t row = int64_t(id[t]) - start;
    if (row >= 0 && row < weight.size(0))
      std::memcpy(to, rows + row * bytes, size_t(bytes));
    else
      std::memset(to, 0, size_t(bytes));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(sglang_xeon, m) {
  m.def("set_isa(str isa) -> ()");
  m.def("pin_threads(int[] cpus) -> int");
  m.def("pack(Tensor w) -> Tensor");
  m.def("unpack(Tensor packed, int n, int k) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int n, int k) -> Tensor");
  m.def("kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor cu_extend, "
      "Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sinks, float scale, float soft_cap, int window, "
      "bool causal) -> Tensor");
  m.def(
      "attention_lse(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor cu_extend, "
      "Tensor prefix_lens, Tensor seq_lens, Tensor page_table, Tensor? sinks, float scale, float soft_cap, int window, "
      "bool causal, bool want_lse) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("gated(Tensor x, int gate) -> Tensor");
  m.def("rope(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved) -> (Tensor, Tensor)");
  m.def("argmax(Tensor x) -> Tensor");
  m.def("embed(Tensor ids, Tensor weight, int start) -> Tensor");
}

// No tensor says where these belong, so they answer for every key.
STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("pin_threads", TORCH_BOX(&pin_threads));
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("kv_write", TORCH_BOX(&kv_write));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_lse", TORCH_BOX(&attention_lse));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("argmax", TORCH_BOX(&argmax));
  m.impl("embed", TORCH_BOX(&embed));
}

}  // namespace sglang_xeon
