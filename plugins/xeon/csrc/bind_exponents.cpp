// Packing of bf16 weights into coded exponents (exponents.h) and back, as torch ops.

#include "bindings.h"
#include "exponents.h"
#include "parallel.h"

namespace sglang_xeon {
namespace {

struct Coding {
  uint16_t* w;  // [experts, n, k], rows `stride` and experts `expert_stride` apart
  int64_t n, k, stride, expert_stride;
  uint8_t* tables;   // [panels of all experts][kCodes]
  int32_t* starts;   // [panels + 1]: where each panel's escapes begin
  uint8_t* packed;   // [panels][units][192]
  Escape* escapes;

  int64_t panels_of_expert() const { return (n + kPanel - 1) / kPanel; }
  int64_t units() const { return (k + unit_of(Element::bf16_coded) - 1) / unit_of(Element::bf16_coded); }
  int64_t columns(int64_t panel) const { return std::min(kPanel, n - panel % panels_of_expert() * kPanel); }
  uint16_t* row(int64_t panel, int64_t column) const {
    return w + panel / panels_of_expert() * expert_stride + (panel % panels_of_expert() * kPanel + column) * stride;
  }
  uint8_t* unit(int64_t panel, int64_t u) const { return packed + (panel * units() + u) * unit_bytes(Element::bf16_coded); }
};

// The byte of a unit's half where (column, k) lies: the inverse of place_of.
struct Bytes {
  uint8_t at[kPanel][4];
  constexpr Bytes() : at() {
    for (int64_t i = 0; i < kHalfUnit; ++i) at[place_of(i).column][place_of(i).k] = uint8_t(i);
  }
};
constexpr Bytes kBytes;

// A panel's table, and how many of its numbers it leaves out.
void measure_panel(const void* opaque, int64_t panel) {
  const Coding& c = *static_cast<const Coding*>(opaque);
  int32_t counts[2][256] = {};  // two, so that equal neighbours do not wait for each other
  for (int64_t j = 0; j < c.columns(panel); ++j) {
    const uint16_t* row = c.row(panel, j);
    for (int64_t k = 0; k < c.k; ++k) ++counts[k % 2][row[k] >> 8];
  }
  int64_t left = c.columns(panel) * c.k;
  for (int i = 0; i < 256; ++i) counts[0][i] += counts[1][i];
  uint8_t* table = c.tables + panel * kCodes;
  for (int i = 0; i < kCodes; ++i) {
    int best = i == 0 ? 0 : int(std::max_element(counts[0], counts[0] + 256) - counts[0]);
    table[i] = uint8_t(best), left -= counts[0][best], counts[0][best] = 0;
  }
  c.starts[panel + 1] = int32_t(left);
}

void pack_panel(const void* opaque, int64_t panel) {
  const Coding& c = *static_cast<const Coding*>(opaque);
  constexpr uint8_t none = 255;
  uint8_t codes[256];
  std::fill(codes, codes + 256, none);
  for (int i = kCodes; i-- > 0;) codes[c.tables[panel * kCodes + i]] = uint8_t(i);
  std::fill(c.unit(panel, 0), c.unit(panel + 1, 0), uint8_t(0));
  Escape* escape = c.escapes + c.starts[panel];
  for (int64_t j = 0; j < c.columns(panel); ++j) {
    const uint16_t* row = c.row(panel, j);
    for (int64_t k = 0; k < c.k; ++k) {
      uint8_t code = codes[row[k] >> 8], byte = kBytes.at[j][k % 4];
      if (code == none) {
        *escape++ = {int32_t(k), uint16_t(j), row[k]};
        continue;
      }
      uint8_t* unit = c.unit(panel, k / 8);
      int64_t half = k / 4 % 2;
      unit[half * kHalfUnit + byte] = uint8_t(row[k]);
      unit[2 * kHalfUnit + byte] |= uint8_t(code << (4 * half));
    }
  }
}

void unpack_panel(const void* opaque, int64_t panel) {
  const Coding& c = *static_cast<const Coding*>(opaque);
  const uint8_t* table = c.tables + panel * kCodes;
  for (int64_t j = 0; j < c.columns(panel); ++j) {
    uint16_t* row = c.row(panel, j);
    for (int64_t k = 0; k < c.k; ++k) {
      const uint8_t* unit = c.unit(panel, k / 8);
      int64_t half = k / 4 % 2, byte = kBytes.at[j][k % 4];
      row[k] = uint16_t(table[unit[2 * kHalfUnit + byte] >> (4 * half) & 15] << 8 | unit[half * kHalfUnit + byte]);
    }
  }
  for (const Escape* e = c.escapes + c.starts[panel]; e < c.escapes + c.starts[panel + 1]; ++e)
    c.row(panel, e->column)[e->k] = e->value;
}

// w: bf16[experts, n, k], tables: uint8[panels, 16], starts: int32[panels + 1], with the panels of all experts.
Coding coding_of(const Tensor& w, const Tensor& tables, const Tensor& starts) {
  STD_TORCH_CHECK(
      w.dim() == 3 && w.scalar_type() == ScalarType::BFloat16 && (w.size(2) <= 1 || w.stride(2) == 1),
      "sglang_xeon: exponents are coded of rows of bfloat16");
  Coding coding{static_cast<uint16_t*>(w.data_ptr()), w.size(1), w.size(2), w.stride(1), w.stride(0)};
  int64_t panels = w.size(0) * coding.panels_of_expert();
  int32_of(starts, "starts");
  STD_TORCH_CHECK(
      tables.scalar_type() == ScalarType::Byte && tables.is_contiguous() && tables.numel() == panels * kCodes && starts.numel() == panels + 1,
      "sglang_xeon: a weight of ", panels, " panels has [", panels, ", 16] tables and ", panels + 1, " starts");
  coding.tables = static_cast<uint8_t*>(tables.data_ptr()), coding.starts = static_cast<int32_t*>(starts.data_ptr());
  return coding;
}

// Fills tables and starts, of which the last is the number of escapes.
void measure_exponents(const Tensor& w, Tensor tables, Tensor starts) {
  Coding coding = coding_of(w, tables, starts);
  int64_t panels = starts.numel() - 1, total = coding.starts[0] = 0;
  run_tasks(panels, measure_panel, &coding);
  for (int64_t i = 1; i <= panels; ++i) {
    total += coding.starts[i];
    coding.starts[i] = int32_t(std::min<int64_t>(total, INT32_MAX));
  }
}

void convert(
    const Tensor& w, const Tensor& tables, const Tensor& starts, const Tensor& packed, const Tensor& escapes,
    void (*task)(const void*, int64_t)) {
  Coding coding = coding_of(w, tables, starts);
  int64_t panels = starts.numel() - 1, bytes = panels * coding.units() * unit_bytes(Element::bf16_coded);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == bytes && escapes.is_contiguous() &&
          escapes.numel() * int64_t(escapes.element_size()) >= coding.starts[panels] * int64_t(sizeof(Escape)),
      "sglang_xeon: this weight takes ", bytes, " bytes and ", coding.starts[panels], " escapes");
  coding.packed = static_cast<uint8_t*>(packed.data_ptr()), coding.escapes = static_cast<Escape*>(escapes.data_ptr());
  run_tasks(panels, task, &coding);
}

void pack_exponents(const Tensor& w, const Tensor& tables, const Tensor& starts, Tensor packed, Tensor escapes) {
  convert(w, tables, starts, packed, escapes, pack_panel);
}

void unpack_exponents(const Tensor& packed, const Tensor& tables, const Tensor& starts, const Tensor& escapes, Tensor w) {
  convert(w, tables, starts, packed, escapes, unpack_panel);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sglang_xeon, m) {
  m.def("measure_exponents(Tensor w, Tensor(a!) tables, Tensor(b!) starts) -> ()");
  m.def("pack_exponents(Tensor w, Tensor tables, Tensor starts, Tensor(a!) packed, Tensor(b!) escapes) -> ()");
  m.def("unpack_exponents(Tensor packed, Tensor tables, Tensor starts, Tensor escapes, Tensor(a!) w) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CPU, m) {
  m.impl("measure_exponents", TORCH_BOX(&measure_exponents));
  m.impl("pack_exponents", TORCH_BOX(&pack_exponents));
  m.impl("unpack_exponents", TORCH_BOX(&unpack_exponents));
}

}  // namespace sglang_xeon
