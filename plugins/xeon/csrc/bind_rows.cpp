// Ops that treat every row alone, as torch ops: norms, activations, rope, argmax, embedding.

#include "bindings.h"

namespace sglang_xeon {
namespace {

NormArgs norm_args(const Tensor& x, const Tensor& weight, double eps) {
  NormArgs args{};
  int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(weight.numel() == x.size(last) && weight.is_contiguous(), "sglang_xeon: norm weight does not fit x");
  args.weight = weight.data_ptr(), args.weight_dtype = dtype_of(weight, "weight");
  args.width = x.size(last), args.eps = float(eps);
  return args;
}

// x, [..., M], as rows of groups of M: views such as the q heads of a merged qkv are read in place.
struct Groups {
  Tensor held;  // x, or a copy of it
  Rows rows;
  int64_t inner, inner_stride;
};

Groups groups_of(const Tensor& x, const char* name) {
  bool heads = x.dim() == 3, by_row = heads || x.dim() == 2;
  Tensor held = by_row && x.stride(x.dim() - 1) == 1 ? x : as_contiguous(x);
  Rows rows{held.data_ptr(), dtype_of(held, name), by_row ? held.stride(0) : x.size(x.dim() - 1)};
  return {held, rows, heads ? x.size(1) : 1, heads ? held.stride(1) : 0};
}

Tensor norm_of(const Tensor& x, const Tensor* gate, const Tensor& weight, double eps) {
  NormArgs args = norm_args(x, weight, eps);
  Groups from = groups_of(x, "x"), opens = gate ? groups_of(*gate, "gate") : Groups{};
  Tensor out = empty_as(x);
  args.x = from.rows, args.inner = from.inner, args.inner_stride = from.inner_stride;
  if (gate) args.gate = opens.rows, args.gate_inner_stride = opens.inner_stride;
  args.out = out.data_ptr();
  if (!x.numel()) return out;
  args.rows = x.numel() / args.width / args.inner;
  kernels().norm(args);
  return out;
}

// x: [..., M], weight: [M] -> [..., M]
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) { return norm_of(x, nullptr, weight, eps); }

// x, gate: [..., M], weight: [M] -> [..., M]: the norm, rounded, times silu of the gate
Tensor rms_norm_gated(const Tensor& x, const Tensor& gate, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(
      gate.sizes() == x.sizes() && gate.scalar_type() == x.scalar_type(),
      "sglang_xeon: x and gate must be of one shape and dtype");
  return norm_of(x, &gate, weight, eps);
}

// x, residual: [T, M] -> the norm of their rounded sum, and the sum
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  NormArgs args = norm_args(x, weight, eps);
  STD_TORCH_CHECK(
      x.dim() == 2 && residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == x.size(1) &&
          residual.scalar_type() == x.scalar_type(),
      "sglang_xeon: x and residual must be [T, M] of one dtype");
  Tensor from = with_contiguous_rows(x), other = as_contiguous(residual);
  Tensor out = empty_as(x), sum = empty_as(x);
  args.x = rows_of(from, "x"), args.residual = other.data_ptr();
  args.out = out.data_ptr(), args.residual_out = sum.data_ptr();
  args.rows = x.size(0), args.inner = 1;
  if (x.numel()) kernels().norm(args);
  return {out, sum};
}

// x: [..., M], weight, bias: [M] -> [..., M]
Tensor layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      weight.numel() == width && weight.is_contiguous() && (!bias || (bias->numel() == width && bias->is_contiguous())),
      "sglang_xeon: norm weight does not fit x");
  Tensor from = as_contiguous(x), out = empty_as(x);
  LayerNormArgs args{};
  args.x = {from.data_ptr(), dtype_of(from, "x"), width};
  args.weight = weight.data_ptr(), args.weight_dtype = dtype_of(weight, "weight");
  if (bias) args.bias = bias->data_ptr(), args.bias_dtype = dtype_of(*bias, "bias");
  args.out = out.data_ptr(), args.rows = width ? x.numel() / width : 0, args.width = width, args.eps = float(eps);
  if (x.numel()) kernels().layer_norm(args);
  return out;
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
  int64_t bytes = weight.size(1) * (dtype_of(weight, "weight") == DType::bf16 ? 2 : 4);
  Tensor out = empty({ids.numel(), weight.size(1)}, weight.scalar_type());
  EmbedArgs args{id,    static_cast<const char*>(weight.data_ptr()), static_cast<char*>(out.data_ptr()), ids.numel(), start, weight.size(0),
                 bytes};
  if (out.numel()) kernels().embed(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor");
  m.def("gated(Tensor x, int gate) -> Tensor");
  m.def("rope(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved) -> (Tensor, Tensor)");
  m.def("argmax(Tensor x) -> Tensor");
  m.def("embed(Tensor ids, Tensor weight, int start) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_gated", TORCH_BOX(&rms_norm_gated));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("argmax", TORCH_BOX(&argmax));
  m.impl("embed", TORCH_BOX(&embed));
}

}  // namespace sglang_xeon
