// From logits to ids, as torch ops.

#include "bindings.h"

namespace sglang_xeon {
namespace {

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "sglang_xeon: logits are [R, V]");
}

Tensor contiguous_of(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == type && t.numel() == count, "sglang_xeon: ", name, " must be ", count, " of ",
      type == ScalarType::Int ? "int32" : "float32");
  return torch::stable::contiguous(t);
}

// logits: [R, V]; temperature, top_p, min_p: float32[R]; top_k, seeds, positions: int32[R] -> int32[R]
Tensor sample(
    const Tensor& logits, const Tensor& temperature, const Tensor& top_p, const Tensor& top_k, const Tensor& min_p,
    const Tensor& seeds, const Tensor& positions, double greedy_below, bool needs_filter) {
  check_logits(logits);
  int64_t rows = logits.size(0);
  Tensor from = with_contiguous_rows(logits), out = empty({rows}, ScalarType::Int);
  Tensor floats[] = {
      contiguous_of(temperature, ScalarType::Float, rows, "temperature"), contiguous_of(top_p, ScalarType::Float, rows, "top_p"),
      contiguous_of(min_p, ScalarType::Float, rows, "min_p")};
  Tensor ints[] = {
      contiguous_of(top_k, ScalarType::Int, rows, "top_k"), contiguous_of(seeds, ScalarType::Int, rows, "seeds"),
      contiguous_of(positions, ScalarType::Int, rows, "positions")};
  auto float_at = [&](int i) { return static_cast<const float*>(floats[i].data_ptr()); };
  auto int_at = [&](int i) { return static_cast<const int32_t*>(ints[i].data_ptr()); };
  SampleArgs args{rows_of(from, "logits"), float_at(0), float_at(1), float_at(2), int_at(0), int_at(1), int_at(2),
                  static_cast<int32_t*>(out.data_ptr()), rows, logits.size(1), float(greedy_below), needs_filter};
  if (rows) kernels().sample(args);
  return out;
}

// logits: [R, V], bits: int32[R, ceil(V / 32)] -> [R, V]
Tensor mask(const Tensor& logits, const Tensor& bits) {
  check_logits(logits);
  int64_t rows = logits.size(0), width = logits.size(1);
  Tensor from = with_contiguous_rows(logits), out = empty({rows, width}, logits.scalar_type());
  Tensor words = contiguous_of(bits, ScalarType::Int, rows * ((width + 31) / 32), "bitmask");
  MaskArgs args{rows_of(from, "logits"), static_cast<const int32_t*>(words.data_ptr()), {}, rows, width};
  args.out = {out.data_ptr(), args.logits.dtype, width};
  if (rows) kernels().mask(args);
  return out;
}

// logits: [R, V]; rows, ids: int32[E]; repetition, add: float32[E] -> float32[R, V]
Tensor adjust(const Tensor& logits, const Tensor& rows, const Tensor& ids, const Tensor& repetition, const Tensor& add) {
  check_logits(logits);
  int64_t entries = rows.numel();
  Tensor from = with_contiguous_rows(logits), out = empty({logits.size(0), logits.size(1)}, ScalarType::Float);
  Tensor at_row = contiguous_of(rows, ScalarType::Int, entries, "rows"), at_id = contiguous_of(ids, ScalarType::Int, entries, "ids");
  Tensor times = contiguous_of(repetition, ScalarType::Float, entries, "repetition");
  Tensor plus = contiguous_of(add, ScalarType::Float, entries, "add");
  AdjustArgs args{rows_of(from, "logits"), static_cast<const int32_t*>(at_row.data_ptr()),
                  static_cast<const int32_t*>(at_id.data_ptr()), static_cast<const float*>(times.data_ptr()),
                  static_cast<const float*>(plus.data_ptr()), static_cast<float*>(out.data_ptr()), logits.size(0), logits.size(1),
                  entries};
  for (int64_t e = 0; e < entries; ++e)
    STD_TORCH_CHECK(
        args.row[e] >= 0 && args.row[e] < args.rows && args.id[e] >= 0 && args.id[e] < args.width, "sglang_xeon: no logit at [",
        args.row[e], ", ", args.id[e], "]");
  if (args.rows) kernels().adjust(args);
  return out;
}

// logits: [R, V] -> float32[R, V]
Tensor soft_cap(const Tensor& logits, double cap) {
  check_logits(logits);
  Tensor from = with_contiguous_rows(logits), out = empty({logits.size(0), logits.size(1)}, ScalarType::Float);
  SoftCapArgs args{rows_of(from, "logits"), static_cast<float*>(out.data_ptr()), logits.size(0), logits.size(1), float(cap)};
  if (args.rows) kernels().soft_cap(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor top_k, Tensor min_p, Tensor seeds, Tensor positions, "
      "float greedy_below, bool needs_filter) -> Tensor");
  m.def("mask(Tensor logits, Tensor bits) -> Tensor");
  m.def("adjust(Tensor logits, Tensor rows, Tensor ids, Tensor repetition, Tensor add) -> Tensor");
  m.def("soft_cap(Tensor logits, float cap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("mask", TORCH_BOX(&mask));
  m.impl("adjust", TORCH_BOX(&adjust));
  m.impl("soft_cap", TORCH_BOX(&soft_cap));
}

}  // namespace sglang_xeon
