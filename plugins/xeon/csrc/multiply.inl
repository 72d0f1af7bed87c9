// `multiply`: prepared activations times some panels of a weight in any format. What gemm.linear, experts and others build on.

INLINE int64_t panel_bytes(const Weight& w) { return w.k_padded / unit_of(w.element) * unit_bytes(w.element); }

INLINE bool is_coded(const Weight& w) {
  return w.element != Element::f32 && w.element != Element::bf16 && w.element != Element::int8;
}

// Rows of a task. Of what is widened first more, as each task widens its panels anew: for 96 rows that takes a tenth of the products' time.
INLINE int64_t row_block(const Weight& w, const TileKernels* tiles) {
  bool widened = w.element == Element::bf16_coded ? tiles != nullptr : is_coded(w);
  return widened ? 4 * kRowBlock : kRowBlock;
}

// Panels that `multiply` takes side by side.
INLINE int64_t panels_per_step(const Weight& w, int64_t rows) {
  if (is_coded(w) && w.element != Element::bf16_coded && rows <= kCodedRows) return coded_panels(int(rows));
  return panels_at_once(int(ceil_div(rows, ceil_div(rows, kMaxRows))));
}

constexpr int64_t kWidenDepth = 256;  // k of a block of codes, where no group is longer: its panels, widened, fit L1

// One block of k: [k0, k1), which begins with group `group`.
struct KBlock {
  int64_t k0, k1, group;
};

INLINE int64_t num_blocks(const Weight& w, int64_t length) { return w.bounds ? w.groups : ceil_div(w.k_padded, length); }

INLINE KBlock block_at(const Weight& w, int64_t length, int64_t i) {
  if (w.bounds) return {w.bounds[i], w.bounds[i + 1], i};
  return {i * length, min1((i + 1) * length, w.k_padded), w.groups > 1 ? i * length / w.group : 0};
}

// c += sums * scale * row_scale, for the panels of one group.
static void add_scaled(
    const CodedTile& t, const float* sums, int64_t sums_stride, int64_t rows, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p) {
    vf scale[kVecs];
    UNROLL for (int v = 0; v < kVecs; ++v) scale[v] = load_scales(t.scales + p * t.scale_step, t.scale_type, v * VL);
    for (int64_t r = 0; r < rows; ++r) {
      vf row_scale = splat(t.row_scales ? t.row_scales[r * t.row_scale_step] : 1.0f);
      UNROLL for (int v = 0; v < kVecs; ++v) {
        float* c = t.c + r * t.c_stride + p * kPanel + v * VL;
        vf x = load(sums + r * sums_stride + p * kPanel + v * VL) * row_scale;
        store(c, x * scale[v] + load(c));
      }
    }
  }
}

// Fetches scales and zeros of the `groups` groups that are `ahead` groups further on.
INLINE void prefetch_groups(const CodedTile& t, int64_t ahead, int64_t groups, int64_t count) {
  int64_t size = t.scales ? kPanel * scale_bytes(t.scale_type) : 0;
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = 0; i < groups * size; i += 64) prefetch_l2(t.scales + p * t.scale_step + ahead * size + i);
    if (t.zeros) prefetch_l2(t.zeros + p * t.zero_step + ahead * kPanel);
  }
}

// `rows` rows of a block, from row `start`.
INLINE CodedTile rows_of(CodedTile t, int64_t start) {
  t.a = static_cast<const Act*>(t.a) + start * t.a_stride, t.c += start * t.c_stride;
  if (t.row_scales) t.row_scales += start * t.row_scale_step;
  return t;
}

// A block that tiles widen themselves, up to kCodedRows rows at a time: the first of them for all.
template <Element E>
static void multiply_codes(CodedTile t, int64_t rows, int64_t count) {
  static constexpr CodedTiles<E> tiles;
  int64_t groups = ceil_div(rows, kCodedRows), first = group_start(rows, groups, 1);
  if (count == coded_panels(int(first))) {
    if (groups == 1) return tiles.many[rows](t);
#ifdef HAS_DOT_BF16
    static constexpr CodedTiles<kWide> plain;
    constexpr int64_t step = unit_of(E) / unit_of(kWide);
    t.wide = static_cast<char*>(scratch(kSlotWidened, size_t(count * t.units * step * unit_bytes(kWide))));
    tiles.keeping[first](t);
    t.w = t.wide, t.units *= step, t.group_units *= step, t.panel_bytes = t.units * unit_bytes(kWide);
    for (int64_t g = 1; g < groups; ++g) {
      int64_t start = group_start(rows, groups, g);
      plain.many[group_start(rows, groups, g + 1) - start](rows_of(t, start));
    }
#endif
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t r = 0; r < rows; ++r) tiles.one(rows_of(t, r));
    t.w += t.panel_bytes, t.zeros += t.zero_step, t.c += kPanel, t.scales += t.scales ? t.scale_step : 0;
  }
}

constexpr int64_t kLeastTileRows = 16;  // rows from which AMX tiles, which have as many, are worth their set-up

// Whether blocks of k end where tiles do: a tile takes 64 bytes of a row, and may read on only where the row has ended.
INLINE bool fits_tiles(const Weight& w, int64_t rows) {
  return sizeof(Act) == 2 && rows >= kLeastTileRows && !w.bounds && (w.groups == 1 || w.group % 32 == 0);
}

// A block of some panels that lie in scratch memory as kWide codes: c (+)= a * wide.
struct WideBlock {
  const Act* a;
  int64_t a_stride;
  const char* wide;
  int64_t length;  // in k
  float* c;
  int64_t c_stride;
  bool add;
};
static void multiply_wide(const WideBlock& t, int64_t rows, int64_t count, const TileKernels* amx) {
  static constexpr Tiles<kWidePath> tiles;
  int64_t panel_bytes = t.length * (unit_bytes(kWide) / unit_of(kWide)), groups = ceil_div(rows, kMaxRows);
  if (amx) return amx->bf16({t.a, t.a_stride * 2, t.wide, panel_bytes, t.length / 2, t.c, t.c_stride, rows, count, t.add});
  for (int64_t g = 0; g < groups; ++g) {
    int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
    const Act* a = t.a + start * t.a_stride;
    float* c = t.c + start * t.c_stride;
    if (count == panels_at_once(int(size))) {
      tiles.many[size](a, t.a_stride, t.wide, panel_bytes, t.length / 2, c, t.c_stride, t.add);
    } else {
      for (int64_t p = 0; p < count; ++p)
        tiles.one[size](a, t.a_stride, t.wide + p * panel_bytes, panel_bytes, t.length / 2, c + p * kPanel, t.c_stride, t.add);
    }
  }
}

// A block of codes that is widened first, for all its rows.
template <Element E>
static void multiply_widened(const CodedTile& t, int64_t length, int64_t rows, int64_t count, const TileKernels* amx) {
  constexpr int64_t per_k = unit_bytes(kWide) / unit_of(kWide);
  char* wide = static_cast<char*>(scratch(kSlotWidened, size_t(count * (length * per_k + rows * kPanel * 4))));
  float* sums = reinterpret_cast<float*>(wide + count * length * per_k);
  for (int64_t p = 0; p < count; ++p) widen<E>(t.w + p * t.panel_bytes, t.units, t.zeros + p * t.zero_step, wide + p * length * per_k);
  float* c = t.scales ? sums : t.c;
  int64_t c_stride = t.scales ? count * kPanel : t.c_stride;
  multiply_wide({static_cast<const Act*>(t.a), t.a_stride, wide, length, c, c_stride, !t.scales}, rows, count, amx);
  if (t.scales) add_scaled(t, sums, c_stride, rows, count);
}

// Sums over panels [panel, panel + count) of one step, not yet scaled by row and column. `next`: the panel that is read after these,
// -1 if none is.
template <Element E>
static void multiply_coded(
    const Weight& w, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t count, float* c, int64_t c_stride,
    const TileKernels* amx, int64_t next) {
  constexpr int64_t unit = unit_of(E);
  // Of panels that fill no step, tiles take one row at a time: worth it for a few.
  bool whole_step = count == panels_per_step(w, rows);
  bool tiles_widen = rows <= (whole_step ? kCodedRows : min1(int64_t(kCodedRows), int64_t(8))) || (kTilesWiden && whole_step && !amx);
  // A tile scales group after group; what is widened first is one group.
  int64_t length = w.groups == 1 ? kWidenDepth : tiles_widen ? max1(kWidenDepth / w.group, int64_t(1)) * w.group : w.group;
  int64_t bytes = panel_bytes(w), one_scale = kPanel * scale_bytes(w.scale_type);
  const char* codes = static_cast<const char*>(w.codes) + panel * bytes;
  CodedTile t{};
  t.a_stride = x.stride, t.c = c, t.c_stride = c_stride, t.panel_bytes = bytes;
  t.zero_step = w.groups * kPanel, t.scale_step = w.groups * one_scale;
  t.scale_type = w.scale_type, t.row_scale_step = w.groups;
  for (int64_t r = 0; r < rows; ++r) __builtin_memset(c + r * c_stride, 0, size_t(count * kPanel) * sizeof(float));
  for (int64_t b = 0, blocks = num_blocks(w, length); b < blocks; ++b) {
    KBlock block = block_at(w, length, b);
    int64_t at = panel * w.groups + block.group, groups = w.bounds || w.groups == 1 ? 1 : length / w.group;
    t.a = static_cast<const Act*>(x.data) + row * x.stride + block.k0;
    t.w = codes + block.k0 / unit * unit_bytes(E), t.units = (block.k1 - block.k0) / unit;
    t.group_units = groups > 1 ? w.group / unit : t.units;
    t.zeros = w.zeros ? w.zeros + at * kPanel : nullptr;
    t.scales = w.scales ? static_cast<const char*>(w.scales) + at * one_scale : nullptr;
    t.row_scales = x.group_scale ? x.group_scale + row * w.groups + block.group : nullptr;
    bool last = b + 1 == blocks;
    t.ahead = !last ? t.units * unit_bytes(E) : next >= 0 ? codes + (next - panel) * bytes - t.w : 0;
    if (t.units == 0) continue;
    if (!tiles_widen) {
      multiply_widened<E>(t, block.k1 - block.k0, rows, count, amx);
      continue;
    }
    if (!last || next >= 0) prefetch_groups(t, last ? (next - panel) * w.groups - block.group : groups, groups, count);
    multiply_codes<E>(t, rows, count);
  }
}

#include "exponents.inl"

// The same where the weight is what the tiles of gemm.inl or gemm_int8.inl multiply. A, C: types of activations and sums; `amx`
// multiplies in their place where it is given.
template <typename A, typename C, typename TileTable>
static void multiply_plain(
    const TileTable& tiles, const Weight& w, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t count, C* c,
    int64_t c_stride, void (*amx)(const TileBlock&)) {
  int64_t unit = unit_of(w.element), step_bytes = unit_bytes(w.element), bytes = panel_bytes(w), groups = ceil_div(rows, kMaxRows);
  const char* codes = static_cast<const char*>(w.codes) + panel * bytes;
  int64_t depth = w.element == Element::int8 ? 2 * kDepth : kDepth;
  for (int64_t k = 0; k < w.k_padded; k += depth) {
    int64_t units = min1(depth, w.k_padded - k) / unit;
    if (amx) {
      const A* a = static_cast<const A*>(x.data) + row * x.stride + k;
      amx({a, x.stride * int64_t(sizeof(A)), codes + k / unit * step_bytes, bytes, units, c, c_stride, rows, count, k > 0});
      continue;
    }
    for (int64_t g = 0; g < groups; ++g) {
      int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
      const A* a = static_cast<const A*>(x.data) + (row + start) * x.stride + k;
      const char* wp = codes + k / unit * step_bytes;
      C* cp = c + start * c_stride;
      if (count == panels_at_once(int(size))) {
        tiles.many[size](a, x.stride, wp, bytes, units, cp, c_stride, k > 0);
      } else {
        for (int64_t i = 0; i < count; ++i)
          tiles.one[size](a, x.stride, wp + i * bytes, bytes, units, cp + i * kPanel, c_stride, k > 0);
      }
    }
  }
}

// c[r, j] = sum over k of x[row + r, k] * w[panel * 16 + j, k], all scales applied, for `rows` <= row_block(w, tiles) prepared rows
// and panels [panel, panel + count). Rows of c are c_stride >= count * 16 floats apart. Fastest with count a multiple of
// panels_per_step(w, rows). With `tiles` AMX may do it, and then sums in another order where there are rows enough. `then`: the panel
// that the caller's thread will read after these, -1 if it is not known.
static void multiply(
    const Weight& w, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t count, float* c, int64_t c_stride,
    const TileKernels* tiles = nullptr, int64_t then = -1) {
  int64_t step = panels_per_step(w, rows);
  const TileKernels* amx = tiles && fits_tiles(w, rows) ? tiles : nullptr;
  for (int64_t p = 0; p < count; p += step, c += step * kPanel) {
    int64_t at = panel + p, some = min1(step, count - p), width = some * kPanel;
    int64_t next = p + step < count ? at + step : then;
    switch (w.element) {
#ifdef HAS_DOT_BF16
      case Element::f32:
      case Element::f16: __builtin_trap();  // dots_pairs keeps them out
      case Element::bf16: {
        static constexpr Tiles<Path::dot_bf16> table;
        multiply_plain<Act>(table, w, x, row, rows, at, some, c, c_stride, amx ? amx->bf16 : nullptr);
        break;
      }
#else
      case Element::f32: {
        static constexpr Tiles<Path::f32> table;
        multiply_plain<Act>(table, w, x, row, rows, at, some, c, c_stride, nullptr);
        break;
      }
      case Element::bf16: {
        static constexpr Tiles<Path::bf16> table;
        multiply_plain<Act>(table, w, x, row, rows, at, some, c, c_stride, nullptr);
        break;
      }
      case Element::f16: multiply_coded<Element::f16>(w, x, row, rows, at, some, c, c_stride, amx, next); break;
#endif
      case Element::bf16_coded: multiply_exponents(w, x, row, rows, at, some, c, c_stride, amx); break;
      case Element::int4: multiply_coded<Element::int4>(w, x, row, rows, at, some, c, c_stride, amx, next); break;
      case Element::int4_zero: multiply_coded<Element::int4_zero>(w, x, row, rows, at, some, c, c_stride, amx, next); break;
      case Element::e2m1: multiply_coded<Element::e2m1>(w, x, row, rows, at, some, c, c_stride, amx, next); break;
      case Element::fp8:
#ifdef HAS_DOT_BF16
        if (has_vbmi()) {
          multiply_coded<kFp8Bytes>(w, x, row, rows, at, some, c, c_stride, amx, next);
          break;
        }
#endif
        multiply_coded<Element::fp8>(w, x, row, rows, at, some, c, c_stride, amx, next);
        break;
      case Element::int8: {
        static constexpr Int8Tiles table;
        auto* sums = reinterpret_cast<int32_t*>(c);
        multiply_plain<ActInt8>(table, w, x, row, rows, at, some, sums, c_stride, amx ? amx->int8 : nullptr);
        for (int64_t r = 0; r < rows; ++r) scale_int8(w, x, row + r, at, c + r * c_stride, width);
        continue;
      }
    }
    if (!w.column_scale && !x.row_scale) continue;
    for (int64_t r = 0; r < rows; ++r) {
      vf row_scale = splat(x.row_scale ? x.row_scale[row + r] : 1.0f);
      for (int64_t j = 0; j < width; j += VL) {
        vf y = load(c + r * c_stride + j) * row_scale;
        store(c + r * c_stride + j, w.column_scale ? y * load(w.column_scale + at * kPanel + j) : y);
      }
    }
  }
}
