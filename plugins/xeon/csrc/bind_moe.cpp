// moe.route, moe.fused and gemm.grouped as torch ops.

#include "weight_args.h"

namespace sglang_xeon {
namespace {

// `held` keeps a copied bias alive.
ExpertStack stack_of(
    const Weight& w, const MaybeTensor& x_scale, const MaybeTensor& bias, int64_t experts, const Facts& facts, Tensor& held) {
  ExpertStack stack{w, Quantize(facts[2]), data_or_null<float>(x_scale), nullptr, DType::f32};
  STD_TORCH_CHECK(!x_scale || x_scale->numel() == experts, "sglang_xeon: x_scale must have ", experts, " elements");
  if (bias) {
    held = as_contiguous(*bias);
    STD_TORCH_CHECK(held.numel() == experts * w.n, "sglang_xeon: the experts' bias must be [", experts, ", ", w.n, "]");
    stack.bias = held.data_ptr(), stack.bias_dtype = dtype_of(held, "bias");
  }
  return stack;
}

// x: [T, M], w13: [X] of [2F, M], w2: [X] of [M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M].
// gate: enum Gate; clamped: swiglu_clamped with alpha and limit instead.
Tensor fused_experts(
    const Tensor& x, const Tensor& w13, const MaybeTensor& scales13, const MaybeTensor& zeros13, const MaybeTensor& column_scale13,
    const MaybeTensor& column_sum13, const MaybeTensor& tables13, const MaybeTensor& starts13, const MaybeTensor& escapes13, const MaybeTensor& x_scale13,
    const MaybeTensor& bias13, Facts facts13, const Tensor& w2, const MaybeTensor& scales2, const MaybeTensor& zeros2,
    const MaybeTensor& column_scale2, const MaybeTensor& column_sum2, const MaybeTensor& tables2, const MaybeTensor& starts2, const MaybeTensor& escapes2,
    const MaybeTensor& x_scale2, const MaybeTensor& bias2, Facts facts2, const Tensor& weights, const Tensor& ids,
    const MaybeTensor& expert_map, int64_t gate, bool clamped, double alpha, double limit, bool weight_on_input, bool tiles) {
  STD_TORCH_CHECK(
      x.dim() == 2 && ids.dim() == 2 && ids.size(0) == x.size(0) && weights.numel() == ids.numel() && w2.size(0) == w13.size(0),
      "sglang_xeon: experts take [T, M], [T, K] and two stacks of one size");
  STD_TORCH_CHECK(
      weights.scalar_type() == ScalarType::Float && weights.is_contiguous(), "sglang_xeon: weights must be contiguous float32");
  int64_t hidden = x.size(1), experts = w13.size(0);
  Tensor rows = with_contiguous_rows(x), out = empty({x.size(0), hidden}, x.scalar_type()), held13, held2;
  ExpertsArgs args{};
  args.x = rows_of(rows, "x");
  Weight up = weight_of(w13, scales13, zeros13, column_scale13, column_sum13, tables13, starts13, escapes13, {}, {}, facts13);
  Weight down = weight_of(w2, scales2, zeros2, column_scale2, column_sum2, tables2, starts2, escapes2, {}, {}, facts2);
  STD_TORCH_CHECK(
      up.k == hidden && down.n == hidden && up.n == 2 * down.k, "sglang_xeon: stacks of [", up.n, ", ", up.k, "] and [", down.n, ", ",
      down.k, "] do not fit x of ", hidden, " columns");
  args.w13 = stack_of(up, x_scale13, bias13, experts, facts13, held13), args.w2 = stack_of(down, x_scale2, bias2, experts, facts2, held2);
  args.weights = static_cast<const float*>(weights.data_ptr()), args.ids = int32_of(ids, "ids");
  if (expert_map) args.expert_map = int32_of(*expert_map, "expert_map"), args.map_size = expert_map->numel();
  args.out = {out.data_ptr(), args.x.dtype, hidden};
  args.tokens = x.size(0), args.top_k = ids.size(1), args.num_experts = experts, args.hidden = hidden, args.width = down.k;
  args.gate = Gate(gate), args.clamped = clamped, args.alpha = float(alpha), args.limit = float(limit);
  args.weight_on_input = weight_on_input, args.tiles = tiles ? kernels().tiles : nullptr;
  if (out.numel()) kernels().experts(args);
  return out;
}

// x: [S, k], w: [X] of [n, k], sizes: int32[X] -> [S, n]
Tensor grouped(
    const Tensor& x, const Tensor& w, const MaybeTensor& scales, const MaybeTensor& zeros, const MaybeTensor& column_scale,
    const MaybeTensor& column_sum, const MaybeTensor& tables, const MaybeTensor& starts, const MaybeTensor& escapes, const MaybeTensor& x_scale,
    const MaybeTensor& bias, Facts facts, const Tensor& sizes, bool tiles) {
  Weight first = weight_of(w, scales, zeros, column_scale, column_sum, tables, starts, escapes, {}, {}, facts);
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(1) == first.k && sizes.numel() == w.size(0), "sglang_xeon: grouped takes [S, ", first.k,
      "] and a size an expert");
  Tensor rows = with_contiguous_rows(x), out = empty({x.size(0), first.n}, x.scalar_type()), held;
  GroupedArgs args{};
  args.x = rows_of(rows, "x"), args.w = stack_of(first, x_scale, bias, w.size(0), facts, held);
  args.sizes = int32_of(sizes, "group_sizes"), args.out = {out.data_ptr(), args.x.dtype, first.n};
  args.rows = x.size(0), args.num_experts = w.size(0);
  args.tiles = tiles ? kernels().tiles : nullptr;
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
    held = as_contiguous(*bias);
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
  m.def(
      "fused_experts(Tensor x, Tensor w13, Tensor? scales13, Tensor? zeros13, Tensor? column_scale13, Tensor? column_sum13, "
      "Tensor? tables13, Tensor? starts13, Tensor? escapes13, Tensor? x_scale13, Tensor? bias13, int[] facts13, Tensor w2, Tensor? scales2, Tensor? zeros2, Tensor? column_scale2, "
      "Tensor? column_sum2, Tensor? tables2, Tensor? starts2, Tensor? escapes2, Tensor? x_scale2, Tensor? bias2, int[] facts2, Tensor weights, Tensor ids, Tensor? expert_map, int gate, "
      "bool clamped, float alpha, float limit, bool weight_on_input, bool tiles) -> Tensor");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, int scoring, int num_groups, int top_groups, bool best_two, bool renormalize, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "grouped(Tensor x, Tensor w, Tensor? scales, Tensor? zeros, Tensor? column_scale, Tensor? column_sum, Tensor? tables, "
      "Tensor? starts, Tensor? escapes, Tensor? x_scale, Tensor? bias, int[] facts, Tensor sizes, bool tiles) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("fused_experts", TORCH_BOX(&fused_experts));
  m.impl("route", TORCH_BOX(&route));
  m.impl("grouped", TORCH_BOX(&grouped));
}

}  // namespace sglang_xeon
