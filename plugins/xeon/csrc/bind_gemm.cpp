// Packed weights and gemm.linear as torch ops.

#include "bindings.h"

namespace sglang_xeon {
namespace {

int64_t packed_size(int64_t n, int64_t k) { return (n + kPanel - 1) / kPanel * kPanel * ((k + 1) / 2 * 2); }


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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("pack(Tensor w) -> Tensor");
  m.def("unpack(Tensor packed, int n, int k) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace sglang_xeon
