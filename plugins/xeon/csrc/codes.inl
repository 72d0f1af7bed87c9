// Weights that are smaller in memory than what is multiplied: codes are widened in registers, and the sums of a group scaled.
// With few rows a tile widens as it goes; with many, a block of panels is widened once for all of them. Both add up the same
// numbers in the same order: a row's result does not depend on how many there are.

constexpr int kCodedRows = 4;  // rows up to which a tile widens codes itself
constexpr int coded_panels(int rows) { return VL == 16 ? (rows <= 1 ? 8 : 4) : (rows <= 1 ? 2 : 1); }

typedef uint16_t vw __attribute__((vector_size(VL * 4), may_alias, aligned(4)));  // 16-bit halves of the lanes
typedef uint8_t vb __attribute__((vector_size(VL), may_alias, aligned(1)));

INLINE vu load_bytes(const uint8_t* p) { return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vu); }

#ifdef EMULATE_AVX512
INLINE vf load_f16(const void* p) {
  vf x;
  __m256 halves[2];
  UNROLL for (int i = 0; i < 2; ++i) halves[i] = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p) + i));
  __builtin_memcpy(&x, halves, sizeof x);
  return x;
}
#elif VL == 16
INLINE vf load_f16(const void* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
#else
INLINE vf load_f16(const void* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
#endif

// e4m3fn in the low byte of each lane. The two codes of NaN, which no checkpoint has, give +-480.
INLINE vf from_fp8(vu code) {
  vu magnitude = code & 0x7f, sign = (code & 0x80) << 24;
  // A subnormal m * 2^-9 is 2^-6 * (1 + m / 8) - 2^-6.
  vf normal = (vf)((magnitude << 20) + 0x3c000000u), small = (vf)((magnitude << 20) + 0x3c800000u) - 0.015625f;
  return (vf)((vu)(magnitude < 8 ? small : normal) | sign);
}

INLINE vf load_scales(const void* p, ScaleType type, int64_t i) {
  switch (type) {
    case ScaleType::f32: return load(static_cast<const float*>(p) + i);
    case ScaleType::e4m3: return from_fp8(load_bytes(static_cast<const uint8_t*>(p) + i));
    case ScaleType::e8m0: break;
  }
  vu code = load_bytes(static_cast<const uint8_t*>(p) + i);
  vu bits = code == 0 ? (vu){} + 0x400000u : code << 23;
  return (vf)(code == 255 ? (vu){} + 0x7fc00000u : bits);
}

constexpr int64_t scale_bytes(ScaleType type) { return type == ScaleType::f32 ? 4 : 1; }

#ifdef HAS_DOT_BF16
// What each 4-bit code stands for, as bf16; a table lookup takes the low five bits of a lane.
struct Table {
  alignas(64) uint16_t values[32] = {};
};
constexpr uint16_t bf16_of(int x) {  // |x| <= 16: exact
  if (x == 0) return 0;
  int size = x < 0 ? -x : x, exponent = 0;
  while (size >> (exponent + 1)) ++exponent;
  return uint16_t((x < 0 ? 0x8000 : 0) | (127 + exponent) << 7 | ((size << 7 >> exponent) & 0x7f));
}
template <Element E>
constexpr Table make_table() {
  constexpr int halves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  Table t;
  for (int i = 0; i < 32; ++i) {
    if (E == Element::int4) t.values[i] = bf16_of(i % 16 - 8);
    if (E == Element::int4_zero) t.values[i] = bf16_of(i < 16 ? i : i - 32);  // code - zero, in -16..15
    if (E == Element::e2m1 && i % 8) t.values[i] = uint16_t((bf16_of(halves[i % 8]) - (1 << 7)) | (i % 16 / 8 << 15));
    if (E == Element::e2m1 && i % 8 == 0) t.values[i] = uint16_t(i % 16 / 8 << 15);
    if (E == Element::fp8 && i % 8) t.values[i] = uint16_t(bf16_of(i % 8) - (9 << 7));  // subnormals: i * 2^-9
  }
  return t;
}
template <Element E>
constexpr Table kTable = make_table<E>();

INLINE vw look_up(const Table& table, vw index) {
#ifndef EMULATE_AVX512
  return (vw)_mm512_permutexvar_epi16((__m512i)index, _mm512_load_si512(table.values));
#else
  return __builtin_shuffle(*reinterpret_cast<const vw*>(table.values), index);
#endif
}

// Pair i of a unit as bf16: k = 2i in the low half of each lane. `zero` has the zero point in both halves.
template <Element E>
INLINE vu pair_of(const char* unit, int v, int i, vu zero) {
  vu code = load_bits(unit + v * (VL * 4));
  if constexpr (E == Element::bf16) return code;
  if constexpr (E == Element::int4 || E == Element::e2m1) return (vu)look_up(kTable<E>, (vw)(code >> (4 * i)));
  if constexpr (E == Element::int4_zero)
    return (vu)look_up(kTable<E>, (vw)((code >> (4 * i)) & 0x000f000fu) - (vw)zero);
  if constexpr (E == Element::fp8) {
    vw bytes = (vw)code;
    vw magnitude = (vw)((vu)(i == 0 ? bytes << 4 : bytes >> 4) & 0x07f007f0u);
    vw sign = (vw)((vu)(i == 0 ? bytes << 8 : bytes) & 0x80008000u);
    vw exponent = (vw)(code & (i == 0 ? 0x00780078u : 0x78007800u));
    vw small = look_up(kTable<E>, i == 0 ? bytes : bytes >> 8);
    return (vu)((exponent == 0 ? small : magnitude + 0x3c00) | sign);
  }
}
INLINE vu spread_zero(const uint8_t* p) { return load_bytes(p) * 0x00010001u; }
#else
// k = i of a unit.
template <Element E>
INLINE vf value_of(const char* unit, int v, int i, vu zero) {
  if constexpr (E == Element::f32) return load(reinterpret_cast<const float*>(unit) + i * kPanel + v * VL);
  if constexpr (E == Element::f16) return load_f16(unit + (i * kPanel + v * VL) * 2);
  vu code = load_bits(unit + v * (VL * 4));
  if constexpr (E == Element::bf16) return i == 0 ? even(code) : odd(code);
  if constexpr (E == Element::fp8) return from_fp8(code >> (8 * (i == 1 ? 2 : i == 2 ? 1 : i)));
  int shift = i / 2 * 4 + i % 2 * 16;
  vi digit = (vi)((code >> shift) & 15);
  if constexpr (E == Element::int4) return __builtin_convertvector(digit - 8, vf);
  if constexpr (E == Element::int4_zero) return __builtin_convertvector(digit - (vi)zero, vf);
  static const float halves[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  vf low = __builtin_shuffle(load(halves), digit);  // of VL entries: the index is taken modulo VL
  return VL == 16 ? low : (vf)((vu)low | ((vu)digit & 8) << 28);
}
INLINE vu spread_zero(const uint8_t* p) { return load_bytes(p); }
#endif

// A block of some panels: `units` of each, all of one group.
struct CodedTile {
  const void* a;
  int64_t a_stride;
  const char* w;
  int64_t panel_bytes, units;
  const uint8_t* zeros;
  int64_t zero_step;  // bytes from one panel's to the next one's
  float* c;
  int64_t c_stride;
  bool add;
  const char* scales;  // of the group; null: none
  int64_t scale_step;
  ScaleType scale_type;
  const float* row_scales;  // of the rows of x for this group; null: none
  int64_t row_scale_step;
};

// c (+)= scale * row_scale * the sum over the block, or c (+)= the sum where there are no scales.
template <Element E, int R, int B>
__attribute__((noinline)) static void coded_tile(const CodedTile& t) {
  constexpr int V = B * kVecs, unit = int(unit_of(E));
  constexpr int64_t bytes = unit_bytes(E);
  vf acc[R][V];
  vu zero[V] = {};
  UNROLL for (int v = 0; v < V; ++v) {
    UNROLL for (int r = 0; r < R; ++r)
      acc[r][v] = t.add && !t.scales ? load(t.c + r * t.c_stride + v * VL) : vf{};
    if (E == Element::int4_zero) zero[v] = spread_zero(t.zeros + v / kVecs * t.zero_step + v % kVecs * VL);
  }
  const char* w = t.w;
#ifdef HAS_DOT_BF16
  const char* a = static_cast<const char*>(t.a);
  for (int64_t u = 0; u < t.units; ++u, w += bytes, a += unit * 2) {
    UNROLL for (int i = 0; i < unit / 2; ++i) {
      vu weights[V];
      UNROLL for (int v = 0; v < V; ++v) weights[v] = pair_of<E>(w + v / kVecs * t.panel_bytes, v % kVecs, i, zero[v]);
      UNROLL for (int r = 0; r < R; ++r) {
        uint32_t x;
        __builtin_memcpy(&x, a + r * t.a_stride * 2 + i * 4, 4);
        UNROLL for (int v = 0; v < V; ++v) accumulate_pairs(acc[r][v], weights[v], x);
      }
    }
  }
#else
  const float* a = static_cast<const float*>(t.a);
  for (int64_t u = 0; u < t.units; ++u, w += bytes, a += unit) {
    // Not unrolled: a shift by a register costs no more, and there are many of these functions.
    _Pragma("GCC unroll 1") for (int i = 0; i < unit; ++i) {
      vf weights[V];
      UNROLL for (int v = 0; v < V; ++v) weights[v] = value_of<E>(w + v / kVecs * t.panel_bytes, v % kVecs, i, zero[v]);
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) accumulate(acc[r][v], weights[v], splat(a[r * t.a_stride + i]));
        if (R > 2) asm volatile("" ::: "memory");  // as in `tile`
      }
    }
  }
#endif
  UNROLL for (int v = 0; v < V; ++v) {
    vf scale = t.scales ? load_scales(t.scales + v / kVecs * t.scale_step, t.scale_type, v % kVecs * VL) : vf{};
    UNROLL for (int r = 0; r < R; ++r) {
      float* c = t.c + r * t.c_stride + v * VL;
      vf x = acc[r][v];
      if (t.scales) {
        if (t.row_scales) x *= splat(t.row_scales[r * t.row_scale_step]);
        x = t.add ? load(c) + x * scale : x * scale;
      }
      store(c, x);
    }
  }
}

using CodedTileFn = void (*)(const CodedTile&);

// Tiles of 1 .. kCodedRows rows over coded_panels panels, and of one row over one panel.
template <Element E>
struct CodedTiles {
  CodedTileFn many[kCodedRows + 1] = {};
  CodedTileFn one = coded_tile<E, 1, 1>;
  constexpr CodedTiles() { fill<kCodedRows>(); }
  template <int R>
  constexpr void fill() {
    many[R] = coded_tile<E, R, coded_panels(R)>;
    if constexpr (R > 1) fill<R - 1>();
  }
};

#ifdef HAS_DOT_BF16
constexpr Element kWide = Element::bf16;  // what codes are widened to
constexpr Path kWidePath = Path::dot_bf16;
#else
constexpr Element kWide = Element::f32;
constexpr Path kWidePath = Path::f32;
#endif

// Units of one panel as the codes of a kWide panel.
template <Element E>
static void widen(const char* w, int64_t units, const uint8_t* zeros, char* out) {
  vu zero[kVecs] = {};
  if (E == Element::int4_zero) {
    UNROLL for (int v = 0; v < kVecs; ++v) zero[v] = spread_zero(zeros + v * VL);
  }
  for (int64_t u = 0; u < units; ++u, w += unit_bytes(E)) {
#ifdef HAS_DOT_BF16
    UNROLL for (int i = 0; i < int(unit_of(E)) / 2; ++i, out += 64) {
      UNROLL for (int v = 0; v < kVecs; ++v)
        *reinterpret_cast<vu*>(out + v * (VL * 4)) = pair_of<E>(w, v, i, zero[v]);
    }
#else
    _Pragma("GCC unroll 1") for (int i = 0; i < unit_of(E); ++i, out += 64) {
      UNROLL for (int v = 0; v < kVecs; ++v) store(reinterpret_cast<float*>(out) + v * VL, value_of<E>(w, v, i, zero[v]));
    }
#endif
  }
}
