// Products with weights of coded exponents (exponents.h): tiles like those of gemm.inl, which decode as they go. AMX has a block of panels
// decoded once for all rows. Last, escapes are added. Sums have one order, whatever the rows.

// Lower and upper bytes of 4 k -> pairs: of k 0, 1 where `second` is false, of k 2, 3 where it is true.
INLINE vu unpack_bytes(vu low, vu high, bool second) {
#if VL == 16 && !defined(EMULATE_AVX512)
  return (vu)(second ? _mm512_unpackhi_epi8((__m512i)low, (__m512i)high) : _mm512_unpacklo_epi8((__m512i)low, (__m512i)high));
#else
  vu out;
  __m256i a[VL / 8], b[VL / 8];
  __builtin_memcpy(a, &low, sizeof a), __builtin_memcpy(b, &high, sizeof b);
  UNROLL for (int i = 0; i < VL / 8; ++i) a[i] = second ? _mm256_unpackhi_epi8(a[i], b[i]) : _mm256_unpacklo_epi8(a[i], b[i]);
  __builtin_memcpy(&out, a, sizeof a);
  return out;
#endif
}

// The table's byte for the low nibble of each byte.
INLINE vu look_up_nibbles(const uint8_t* table, vu codes) {
  codes &= 0x0f0f0f0fu;
  __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
#if VL == 16 && !defined(EMULATE_AVX512)
  return (vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), (__m512i)codes);
#else
  vu out;
  __m256i x[VL / 8];
  __builtin_memcpy(x, &codes, sizeof x);
  UNROLL for (int i = 0; i < VL / 8; ++i) x[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), x[i]);
  __builtin_memcpy(&out, x, sizeof x);
  return out;
#endif
}

// Pair i of a unit, vector v: k = 2i and 2i + 1.
INLINE vu coded_pair(const char* unit, const uint8_t* table, int v, int i) {
  vu codes = load_bits(unit + 2 * kHalfUnit + v * (VL * 4)), low = load_bits(unit + i / 2 * kHalfUnit + v * (VL * 4));
  return unpack_bytes(low, look_up_nibbles(table, i < 2 ? codes : codes >> 4), i % 2);
}

constexpr int64_t kCodedUnit = unit_of(Element::bf16_coded), kCodedBytes = unit_bytes(Element::bf16_coded);
#ifdef HAS_DOT_BF16
constexpr int64_t kAhead = 12 * kCodedBytes;  // bytes of a panel that are asked for before they are needed

// As `tile` of gemm.inl, over `units`. tables: [B][kCodes]
template <int R, int B>
__attribute__((noinline)) static void exponent_tile(
    const Act* a, int64_t a_stride, const char* w, int64_t panel_bytes, const uint8_t* tables, int64_t units, float* c, int64_t c_stride,
    bool add) {
  constexpr int V = B * kVecs;
  vf acc[R][V];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) acc[r][v] = add ? load(c + r * c_stride + v * VL) : vf{};
  }
  for (int64_t u = 0; u < units; ++u, w += kCodedBytes, a += kCodedUnit) {
    UNROLL for (int b = 0; b < B; ++b) {
      UNROLL for (int line = 0; line < int(kCodedBytes / 64); ++line) __builtin_prefetch(w + b * panel_bytes + kAhead + line * 64, 0, 2);
    }
    UNROLL for (int i = 0; i < int(kCodedUnit) / 2; ++i) {
      vu weights[V];
      UNROLL for (int v = 0; v < V; ++v)
        weights[v] = coded_pair(w + v / kVecs * panel_bytes, tables + v / kVecs * kCodes, v % kVecs, i);
      UNROLL for (int r = 0; r < R; ++r) {
        uint32_t x;
        __builtin_memcpy(&x, a + r * a_stride + 2 * i, 4);
        UNROLL for (int v = 0; v < V; ++v) accumulate_pairs(acc[r][v], weights[v], x);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) store(c + r * c_stride + v * VL, acc[r][v]);
  }
}

using ExponentTileFn = void (*)(const Act*, int64_t, const char*, int64_t, const uint8_t*, int64_t, float*, int64_t, bool);

struct ExponentTiles {
  ExponentTileFn many[kMaxRows + 1] = {};
  ExponentTileFn one[kMaxRows + 1] = {};
  constexpr ExponentTiles() { fill<kMaxRows>(); }
  template <int R>
  constexpr void fill() {
    many[R] = exponent_tile<R, panels_at_once(R)>, one[R] = exponent_tile<R, 1>;
    if constexpr (R > 1) fill<R - 1>();
  }
};
#endif

// Units of one panel as the codes of a kWide panel.
static void widen_exponents(const char* w, int64_t units, const uint8_t* table, char* out) {
  for (int64_t u = 0; u < units; ++u, w += kCodedBytes) {
    UNROLL for (int i = 0; i < int(kCodedUnit) / 2; ++i) {
      vu pairs[kVecs];
      UNROLL for (int v = 0; v < kVecs; ++v) pairs[v] = coded_pair(w, table, v, i);
#ifdef HAS_DOT_BF16
      UNROLL for (int v = 0; v < kVecs; ++v, out += VL * 4) *reinterpret_cast<vu*>(out) = pairs[v];
#else
      UNROLL for (int v = 0; v < kVecs; ++v, out += VL * 4) store(reinterpret_cast<float*>(out), even(pairs[v]));
      UNROLL for (int v = 0; v < kVecs; ++v, out += VL * 4) store(reinterpret_cast<float*>(out), odd(pairs[v]));
#endif
    }
  }
}

static void add_escapes(
    const Weight& w, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t count, float* c, int64_t c_stride) {
  const Escape* escapes = static_cast<const Escape*>(w.escapes);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = w.starts[panel + p]; i < w.starts[panel + p + 1]; ++i) {
      float value = to_float(escapes[i].value);
      const Act* a = static_cast<const Act*>(x.data) + row * x.stride + escapes[i].k;
      float* sum = c + p * kPanel + escapes[i].column;
      for (int64_t r = 0; r < rows; ++r) sum[r * c_stride] += load1(a + r * x.stride) * value;
    }
  }
}

// As `multiply`, over panels of one step.
static void multiply_exponents(
    const Weight& w, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t count, float* c, int64_t c_stride,
    const TileKernels* amx) {
  constexpr int64_t wide_bytes = unit_bytes(kWide) / unit_of(kWide);
#ifdef HAS_DOT_BF16
  static constexpr ExponentTiles tiles;
  bool direct = !amx;  // decoding hides behind products and memory
#else
  bool direct = false;  // float32 activations on bfloat16 weights are rare
#endif
  int64_t bytes = panel_bytes(w), depth = direct ? kDepth : kWidenDepth;
  const uint8_t* tables = w.tables + panel * kCodes;
  for (int64_t k = 0; k < w.k_padded; k += depth) {
    int64_t length = min1(depth, w.k_padded - k), units = length / kCodedUnit;
    const char* codes = static_cast<const char*>(w.codes) + panel * bytes + k / kCodedUnit * kCodedBytes;
    const Act* a = static_cast<const Act*>(x.data) + row * x.stride + k;
    if (!direct) {
      char* wide = static_cast<char*>(scratch(kSlotWidened, size_t(count * length * wide_bytes)));
      for (int64_t p = 0; p < count; ++p) widen_exponents(codes + p * bytes, units, tables + p * kCodes, wide + p * length * wide_bytes);
      multiply_wide({a, x.stride, wide, length, c, c_stride, k > 0}, rows, count, amx);
      continue;
    }
#ifdef HAS_DOT_BF16
    for (int64_t g = 0, groups = ceil_div(rows, kMaxRows); g < groups; ++g) {
      int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
      const Act* from = a + start * x.stride;
      float* to = c + start * c_stride;
      if (count == panels_at_once(int(size))) {
        tiles.many[size](from, x.stride, codes, bytes, tables, units, to, c_stride, k > 0);
      } else {
        for (int64_t p = 0; p < count; ++p)
          tiles.one[size](from, x.stride, codes + p * bytes, bytes, tables + p * kCodes, units, to + p * kPanel, c_stride, k > 0);
      }
    }
#endif
  }
  add_escapes(w, x, row, rows, panel, count, c, c_stride);
}
