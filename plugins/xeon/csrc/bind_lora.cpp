// lora.apply as a torch op.

#include "bindings.h"

namespace sglang_xeon {
namespace {

// y: [T, out], x: [T, in], a: [A, P * R, in], b: [A, out, R], token_adapter: int32[T], scale: float32[A, P] -> [T, out].
// parts: outputs of each of P; [] is all of one.
Tensor lora(
    const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& token_adapter, const Tensor& scale,
    std::vector<int64_t> parts) {
  STD_TORCH_CHECK(
      y.dim() == 2 && x.dim() == 2 && a.dim() == 3 && b.dim() == 3 && scale.dim() == 2 && y.size(0) == x.size(0) &&
          token_adapter.numel() == x.size(0),
      "sglang_xeon: lora takes [T, out], [T, in], stacks and an adapter a token");
  if (parts.empty()) parts.push_back(y.size(1));
  int64_t adapters = a.size(0), num_parts = int64_t(parts.size()), rank = b.size(2), total = 0;
  for (int64_t part : parts) total += part;
  STD_TORCH_CHECK(
      a.size(1) == num_parts * rank && a.size(2) == x.size(1) && b.size(0) == adapters && b.size(1) == y.size(1) &&
          scale.size(0) == adapters && scale.size(1) == num_parts && total == y.size(1),
      "sglang_xeon: the stacks' shapes do not fit x, y and parts");
  STD_TORCH_CHECK(
      a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type() && a.is_contiguous() && b.is_contiguous(),
      "sglang_xeon: stacks must be contiguous and of x's dtype");
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), "sglang_xeon: scale must be contiguous float32");
  Tensor y_rows = with_contiguous_rows(y), x_rows = with_contiguous_rows(x);
  Tensor out = empty({y.size(0), y.size(1)}, y.scalar_type());
  LoraArgs args{};
  args.y = rows_of(y_rows, "y"), args.x = rows_of(x_rows, "x");
  args.a = a.data_ptr(), args.b = b.data_ptr(), args.dtype = args.x.dtype;
  args.token_adapter = int32_of(token_adapter, "token_adapter"), args.scale = static_cast<const float*>(scale.data_ptr());
  args.parts = parts.data(), args.out = {out.data_ptr(), args.y.dtype, y.size(1)};
  args.tokens = x.size(0), args.adapters = adapters, args.num_parts = num_parts, args.rank = rank;
  args.in = x.size(1), args.width = y.size(1);
  if (out.numel()) kernels().lora(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("lora(Tensor y, Tensor x, Tensor a, Tensor b, Tensor token_adapter, Tensor scale, int[] parts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) { m.impl("lora", TORCH_BOX(&lora)); }

}  // namespace sglang_xeon
