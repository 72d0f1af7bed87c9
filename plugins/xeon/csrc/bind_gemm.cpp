// Packed weights and gemm.linear as torch ops.

#include "weight_args.h"

namespace sglang_xeon {
namespace {

// Codes w: [n, ...] into `packed`, which holds whole panels of them, or back. order: int32[k_padded], or none.
void convert(Tensor packed, Tensor w, const MaybeTensor& order, int64_t element, int64_t k, bool unpack) {
  PackArgs args{};
  args.element = Element(element);
  STD_TORCH_CHECK(element >= 0 && element <= int64_t(Element::int8) && w.dim() == 2, "sglang_xeon: a weight has two dims");
  STD_TORCH_CHECK(packed.is_contiguous() && (w.size(1) <= 1 || w.stride(1) == 1), "sglang_xeon: rows of weights are contiguous");
  int64_t unit = unit_of(args.element), item = int64_t(w.element_size());
  args.w = w.data_ptr(), args.row_bytes = w.stride(0) * item, args.packed = packed.data_ptr();
  args.n = w.size(0), args.k = k, args.unpack = unpack;
  args.order = order ? int32_of(*order, "order") : nullptr;
  args.k_padded = order ? order->numel() : (k + unit - 1) / unit * unit;
  int64_t bytes = (args.n + kPanel - 1) / kPanel * (args.k_padded / unit) * unit_bytes(args.element);
  int64_t row = args.element == Element::f32 ? k * 4 : unit == 2 ? k * 2 : unit == 4 ? k : k / 2;
  STD_TORCH_CHECK(
      packed.numel() * int64_t(packed.element_size()) == bytes && w.size(1) * item == row && (unit < 8 || k % 2 == 0),
      "sglang_xeon: not a packed [", args.n, ", ", k, "] weight");
  if (args.n && k) kernels().pack(args);
}

void pack(const Tensor& w, Tensor packed, const MaybeTensor& order, int64_t element, int64_t k) {
  convert(packed, w, order, element, k, false);
}

void unpack(const Tensor& packed, Tensor w, const MaybeTensor& order, int64_t element, int64_t k) {
  convert(packed, w, order, element, k, true);
}

Tensor run(const Tensor& x, LinearArgs& args, const MaybeTensor& bias, int64_t gate) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == args.w.k, "sglang_xeon: linear takes [m, ", args.w.k, "]");
  args.gate = Gate(gate);
  bool gated = args.gate != Gate::none;
  STD_TORCH_CHECK(!gated || args.w.n % 2 == 0, "sglang_xeon: gate and up are equally many, not ", args.w.n, " together");
  int64_t width = gated ? args.w.n / 2 : args.w.n;
  Tensor rows = with_contiguous_rows(x);
  Tensor out = empty({x.size(0), width}, x.scalar_type());
  args.m = x.size(0);
  args.x = {rows.data_ptr(), float_of(rows, "x"), args.m > 1 ? rows.stride(0) : args.w.k};
  Tensor held;
  if (bias) {
    held = as_contiguous(*bias);
    STD_TORCH_CHECK(held.numel() == args.w.n, "sglang_xeon: bias must have ", args.w.n, " elements");
    args.bias = held.data_ptr(), args.bias_dtype = float_of(held, "bias");
  }
  args.out = {out.data_ptr(), args.x.dtype, width};
  if (args.m && width) kernels().linear(args);
  return out;
}

// x: [m, k] -> [m, n], or [m, n / 2] where gate, of enum Gate, is any. `packed` is of floats, which its dtype tells.
Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t n, int64_t k, int64_t gate, bool tiles) {
  DType dtype = float_of(packed, "weight");
  Element element = dtype == DType::f32 ? Element::f32 : dtype == DType::bf16 ? Element::bf16 : Element::f16;
  LinearArgs args{};
  args.w = weight_of(packed, {}, {}, {}, {}, {}, {}, {}, {}, {}, {int64_t(element), 0, 0, n, k, 0});
  args.tiles = tiles ? kernels().tiles : nullptr;
  return run(x, args, bias, gate);
}

// The same for weights of codes; x is quantised as facts[2] says.
Tensor linear_coded(
    const Tensor& x, const Tensor& packed, const MaybeTensor& scales, const MaybeTensor& zeros, const MaybeTensor& column_scale,
    const MaybeTensor& column_sum, const MaybeTensor& tables, const MaybeTensor& starts, const MaybeTensor& escapes,
    const MaybeTensor& order, const MaybeTensor& bounds, const MaybeTensor& x_scale, const MaybeTensor& bias, Facts facts, int64_t gate, bool tiles) {
  LinearArgs args{};
  args.w = weight_of(packed, scales, zeros, column_scale, column_sum, tables, starts, escapes, order, bounds, facts);
  args.quantize = Quantize(facts[2]);
  args.x_scale = data_or_null<float>(x_scale);
  args.tiles = tiles ? kernels().tiles : nullptr;
  return run(x, args, bias, gate);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("pack(Tensor w, Tensor(a!) packed, Tensor? order, int element, int k) -> ()");
  m.def("unpack(Tensor packed, Tensor(a!) w, Tensor? order, int element, int k) -> ()");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int n, int k, int gate, bool tiles) -> Tensor");
  m.def(
      "linear_coded(Tensor x, Tensor packed, Tensor? scales, Tensor? zeros, Tensor? column_scale, Tensor? column_sum, "
      "Tensor? tables, Tensor? starts, Tensor? escapes, Tensor? order, Tensor? bounds, Tensor? x_scale, Tensor? bias, int[] facts, int gate, bool tiles) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_coded", TORCH_BOX(&linear_coded));
}

}  // namespace sglang_xeon
