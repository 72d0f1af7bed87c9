// Stacks of experts, moe.route, moe.fused and gemm.grouped as torch ops.

#include "bindings.h"

namespace sglang_xeon {
namespace {

int64_t packed_size(int64_t n, int64_t k) { return (n + kPanel - 1) / kPanel * kPanel * ((k + 1) / 2 * 2); }

int64_t element_size(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }

// Each matrix of w: [X, n, k] to or from its row of packed: [X, packed_size].
void pack_stack(const Tensor& w, const Tensor& packed, bool unpack) {
  STD_TORCH_CHECK(w.dim() == 3 && w.is_contiguous(), "sglang_xeon: a stack of experts is contiguous [X, n, k]");
  int64_t n = w.size(1), k = w.size(2);
  STD_TORCH_CHECK(
      packed.dim() == 2 && packed.size(0) == w.size(0) && packed.size(1) == packed_size(n, k) && packed.is_contiguous() &&
          packed.scalar_type() == w.scalar_type(),
      "sglang_xeon: packed does not hold ", w.size(0), " matrices [", n, ", ", k, "]");
  if (!n || !k) return;
  int64_t size = element_size(dtype_of(w, "weight"));
  for (int64_t e = 0; e < w.size(0); ++e) {
    char* from = static_cast<char*>(w.data_ptr()) + e * n * k * size;
    char* to = static_cast<char*>(packed.data_ptr()) + e * packed.size(1) * size;
    kernels().pack({{from, dtype_of(w, "weight"), k}, to, n, k, unpack});
  }
}

// w: [X, n, k] -> [X, packed_size]
Tensor pack_experts(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 3, "sglang_xeon: a stack of experts is [X, n, k]");
  Tensor packed = empty({w.size(0), packed_size(w.size(1), w.size(2))}, w.scalar_type());
  pack_stack(torch::stable::contiguous(w), packed, false);
  return packed;
}

void pack_experts_into(const Tensor& w, const Tensor& packed) { pack_stack(torch::stable::contiguous(w), packed, false); }

// The inverse: packed: [X, packed_size] -> [X, n, k]
Tensor unpack_experts(const Tensor& packed, int64_t n, int64_t k) {
  Tensor w = empty({packed.size(0), n, k}, packed.scalar_type());
  pack_stack(w, packed, true);
  return w;
}

// `held` keeps a copied bias alive.
ExpertStack stack_of(const Tensor& w, const std::optional<Tensor>& bias, int64_t n, int64_t k, Tensor& held) {
  STD_TORCH_CHECK(
      w.dim() == 2 && w.size(1) == packed_size(n, k) && w.is_contiguous(), "sglang_xeon: not a packed stack of [", n, ", ", k, "]");
  DType dtype = dtype_of(w, "weight");
  ExpertStack stack{w.data_ptr(), dtype, w.size(1) * element_size(dtype), nullptr, DType::f32};
  if (bias) {
    held = torch::stable::contiguous(*bias);
    STD_TORCH_CHECK(held.numel() == w.size(0) * n, "sglang_xeon: the experts' bias must be [", w.size(0), ", ", n, "]");
    stack.bias = held.data_ptr(), stack.bias_dtype = dtype_of(held, "bias");
  }
  return stack;
}

// x: [T, M], w13: packed [2F, M], w2: packed [M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M].
// gate: enum Gate; clamped: swiglu_clamped with alpha and limit instead.
Tensor fused_experts(
    const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights, const Tensor& ids, int64_t width,
    const std::optional<Tensor>& bias13, const std::optional<Tensor>& bias2, const std::optional<Tensor>& expert_map, int64_t gate,
    bool clamped, double alpha, double limit, bool weight_on_input) {
  STD_TORCH_CHECK(
      x.dim() == 2 && ids.dim() == 2 && ids.size(0) == x.size(0) && weights.numel() == ids.numel() && w2.size(0) == w13.size(0),
      "sglang_xeon: experts take [T, M], [T, K] and two stacks of one size");
  STD_TORCH_CHECK(
      weights.scalar_type() == ScalarType::Float && weights.is_contiguous(), "sglang_xeon: weights must be contiguous float32");
  int64_t hidden = x.size(1);
  Tensor rows = with_contiguous_rows(x), out = empty({x.size(0), hidden}, x.scalar_type()), held13, held2;
  ExpertsArgs args{};
  args.x = rows_of(rows, "x");
  args.w13 = stack_of(w13, bias13, 2 * width, hidden, held13), args.w2 = stack_of(w2, bias2, hidden, width, held2);
  args.weights = static_cast<const float*>(weights.data_ptr()), args.ids = int32_of(ids, "ids");
  if (expert_map) args.expert_map = int32_of(*expert_map, "expert_map"), args.map_size = expert_map->numel();
  args.out = {out.data_ptr(), args.x.dtype, hidden};
  args.tokens = x.size(0), args.top_k = ids.size(1), args.num_experts = w13.size(0), args.hidden = hidden, args.width = width;
  args.gate = Gate(gate), args.clamped = clamped, args.alpha = float(alpha), args.limit = float(limit);
  args.weight_on_input = weight_on_input;
  if (out.numel()) kernels().experts(args);
  return out;
}

// x: [S, k], w: packed [n, k] of X experts, sizes: int32[X] -> [S, n]
Tensor grouped(const Tensor& x, const Tensor& w, const Tensor& sizes, const std::optional<Tensor>& bias, int64_t n) {
  STD_TORCH_CHECK(x.dim() == 2 && sizes.numel() == w.size(0), "sglang_xeon: grouped takes [S, in] and a size an expert");
  Tensor rows = with_contiguous_rows(x), out = empty({x.size(0), n}, x.scalar_type()), held;
  GroupedArgs args{rows_of(rows, "x"), stack_of(w, bias, n, x.size(1), held), int32_of(sizes, "group_sizes"), {}, x.size(0),
                   w.size(0), n, x.size(1)};
  args.out = {out.data_ptr(), args.x.dtype, n};
  if (out.numel()) kernels().grouped(args);
  return out;
}

// logits: [T, X], bias: float32[X] -> weights: float32[T, top_k], ids: int32[T, top_k]
std::tuple<Tensor, Tensor> route(
    const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k, int64_t scoring, int64_t num_groups, int64_t top_groups,
    bool best_two, bool renormalize, double scale) {
  int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(
      logits.dim() == 2 && top_k >= 1 && top_k <= experts && num_groups >= 1 && experts % num_groups == 0,
      "sglang_xeon: route takes [T, X], top_k of them, in groups of one size");
  Tensor from = with_contiguous_rows(logits), held;
  Tensor weights = empty({tokens, top_k}, ScalarType::Float), ids = empty({tokens, top_k}, ScalarType::Int);
  RouteArgs args{};
  args.logits = rows_of(from, "logits");
  if (bias) {
    held = torch::stable::contiguous(*bias);
    STD_TORCH_CHECK(
        held.scalar_type() == ScalarType::Float && held.numel() == experts, "sglang_xeon: the router's bias must be float32[", experts, "]");
    args.bias = static_cast<const float*>(held.data_ptr());
  }
  args.weights = static_cast<float*>(weights.data_ptr()), args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.tokens = tokens, args.num_experts = experts, args.top_k = top_k;
  args.num_groups = num_groups, args.top_groups = top_groups, args.scoring = Scoring(scoring);
  args.best_two = best_two, args.renormalize = renormalize, args.scale = float(scale);
  if (tokens) kernels().route(args);
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("pack_experts(Tensor w) -> Tensor");
  m.def("pack_experts_into(Tensor w, Tensor(a!) packed) -> ()");
  m.def("unpack_experts(Tensor packed, int n, int k) -> Tensor");
  m.def(
      "fused_experts(Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, int width, Tensor? bias13, Tensor? bias2, "
      "Tensor? expert_map, int gate, bool clamped, float alpha, float limit, bool weight_on_input) -> Tensor");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, int scoring, int num_groups, int top_groups, bool best_two, bool renormalize, "
      "float scale) -> (Tensor, Tensor)");
  m.def("grouped(Tensor x, Tensor w, Tensor sizes, Tensor? bias, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("pack_experts", TORCH_BOX(&pack_experts));
  m.impl("pack_experts_into", TORCH_BOX(&pack_experts_into));
  m.impl("unpack_experts", TORCH_BOX(&unpack_experts));
  m.impl("fused_experts", TORCH_BOX(&fused_experts));
  m.impl("route", TORCH_BOX(&route));
  m.impl("grouped", TORCH_BOX(&grouped));
}

}  // namespace sglang_xeon
