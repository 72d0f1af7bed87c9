// A packed weight as its tensors and facts arrive from Python (sglang_xeon/weights.py), and the Weight made of them.
#pragma once

#include "bindings.h"
#include "exponents.h"

namespace sglang_xeon {

using MaybeTensor = std::optional<Tensor>;

// What does not change while a model runs, in the order of weights.py: element, scale type, quantize, n, k, group.
using Facts = std::vector<int64_t>;

template <typename T>
const T* data_or_null(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Of one matrix, or of the first of a stack: the others' tensors follow.
inline Weight weight_of(
    const Tensor& packed, const MaybeTensor& scales, const MaybeTensor& zeros, const MaybeTensor& column_scale,
    const MaybeTensor& column_sum, const MaybeTensor& tables, const MaybeTensor& starts, const MaybeTensor& escapes,
    const MaybeTensor& order, const MaybeTensor& bounds, const Facts& facts) {
  STD_TORCH_CHECK(facts.size() == 6 && facts[0] >= 0 && facts[0] < kNumElements, "sglang_xeon: not a weight's facts");
  Weight w{};
  w.element = Element(facts[0]), w.scale_type = ScaleType(facts[1]);
  w.n = facts[3], w.k = facts[4], w.group = facts[5];
  int64_t unit = unit_of(w.element), panels = (w.n + kPanel - 1) / kPanel;
  w.k_padded = order ? order->size(-1) : (w.k + unit - 1) / unit * unit;
  w.groups = bounds ? bounds->size(-1) - 1 : w.group > 0 ? (w.k + w.group - 1) / w.group : 1;
  w.codes = packed.data_ptr();
  w.scales = scales ? scales->data_ptr() : nullptr;
  w.zeros = data_or_null<uint8_t>(zeros);
  w.column_scale = data_or_null<float>(column_scale);
  w.column_sum = data_or_null<int32_t>(column_sum);
  w.order = data_or_null<int32_t>(order);
  w.bounds = data_or_null<int32_t>(bounds);
  w.tables = data_or_null<uint8_t>(tables);
  w.starts = data_or_null<int32_t>(starts);
  w.escapes = data_or_null<void>(escapes);
  auto fits = [&](const MaybeTensor& t, int64_t size) { return !t || (t->is_contiguous() && t->numel() % size == 0 && t->numel() > 0); };
  int64_t by_group = panels * w.groups * kPanel, bytes = panels * w.k_padded / unit * unit_bytes(w.element);
  bool coded = w.element == Element::bf16_coded;  // panels of all experts are counted through in what it has
  bool complete = !coded || (tables && starts && escapes && starts->numel() * kCodes == tables->numel() + kCodes);
  bool whole = packed.is_contiguous() && packed.numel() * int64_t(packed.element_size()) % std::max<int64_t>(bytes, 1) == 0 &&
               packed.numel() > 0 && complete && fits(tables, panels * kCodes) && fits(scales, by_group) && fits(zeros, by_group) &&
               fits(column_scale, panels * kPanel) && fits(column_sum, panels * kPanel);
  STD_TORCH_CHECK(whole || w.n * w.k == 0, "sglang_xeon: not a packed [", w.n, ", ", w.k, "] weight");
  return w;
}

}  // namespace sglang_xeon
