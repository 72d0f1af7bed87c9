// Weights that are smaller in memory than what is multiplied: codes are widened in registers, and the sums of a group scaled.
// A tile widens as it goes, or a block of panels is widened once for all rows. Both add up the same numbers in the same order: a
// row's result does not depend on how many there are.

// Rows up to which a tile widens codes itself. VDPBF16PS leaves ports free for it: with more rows the first tile keeps what it
// widens for the others.
#ifdef HAS_DOT_BF16
constexpr int kCodedRows = 12;
constexpr bool kTilesWiden = true;
typedef uint16_t Act;  // of what is multiplied with floats
#else
constexpr int kCodedRows = VL == 16 ? 8 : 4;
constexpr bool kTilesWiden = false;
typedef float Act;
#endif
constexpr int coded_panels(int rows) {
  if (VL == 16) return rows <= 1 && !kTilesWiden ? 8 : rows <= 4 ? 4 : 2;
  return rows <= 1 ? 2 : 1;
}

typedef uint16_t vw __attribute__((vector_size(VL * 4), may_alias, aligned(4)));  // 16-bit halves of the lanes
typedef uint8_t vb __attribute__((vector_size(VL), may_alias, aligned(1)));
typedef uint8_t vb4 __attribute__((vector_size(VL * 4), may_alias, aligned(4)));  // the bytes of the lanes

#if VL == 16 && !defined(EMULATE_AVX512)
INLINE vu load_bytes(const uint8_t* p) { return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
INLINE vu load_bytes(const uint8_t* p) { return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vu); }
#endif

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
    case ScaleType::bf16: return load(static_cast<const uint16_t*>(p) + i);
    case ScaleType::f16: return load_f16(static_cast<const uint16_t*>(p) + i);
    case ScaleType::e4m3: return from_fp8(load_bytes(static_cast<const uint8_t*>(p) + i));
    case ScaleType::e8m0: break;
  }
  vu code = load_bytes(static_cast<const uint8_t*>(p) + i);
  vu bits = code == 0 ? (vu){} + 0x400000u : code << 23;
  return (vf)(code == 255 ? (vu){} + 0x7fc00000u : bits);
}

// Into L2: there it waits without driving what a block reads again out of L1.
INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int64_t scale_bytes(ScaleType type) {
  return type == ScaleType::f32 ? 4 : type == ScaleType::bf16 || type == ScaleType::f16 ? 2 : 1;
}

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

// fp8 as CPUs with VBMI decode it: a byte of the result is looked up by the seven bits of a magnitude.
constexpr Element kFp8Bytes = Element(64);
static_assert(unit_of(kFp8Bytes) == unit_of(Element::fp8) && unit_bytes(kFp8Bytes) == unit_bytes(Element::fp8), "the same codes");

struct ByteTables {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
};
constexpr ByteTables make_byte_tables() {
  ByteTables t;
  for (int i = 0; i < 128; ++i) {
    int bits = i < 8 ? make_table<Element::fp8>().values[i] : (i << 4) + 0x3c00;
    t.low[i] = uint8_t(bits), t.high[i] = uint8_t(bits >> 8);
  }
  return t;
}
constexpr ByteTables kByteTables = make_byte_tables();

INLINE bool has_vbmi() {
#ifdef EMULATE_AVX512
  static thread_local bool has = false;  // both ways in turn: they must agree
  return has = !has;
#else
  return __builtin_cpu_supports("avx512vbmi");
#endif
}

// table[code & 127] of each byte. Not an intrinsic: those are for functions that need VBMI as a whole.
INLINE vu look_up_bytes(const uint8_t* table, vu codes) {
#ifdef EMULATE_AVX512
  vb4 bytes = (vb4)codes;
  for (int i = 0; i < VL * 4; ++i) bytes[i] = table[bytes[i] & 127];
  return (vu)bytes;
#else
  asm("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(load_bits(table)), "vm"(load_bits(table + 64)));
  return codes;
#endif
}

INLINE vw look_up(const Table& table, vw index) {
#ifndef EMULATE_AVX512
  return (vw)_mm512_permutexvar_epi16((__m512i)index, _mm512_load_si512(table.values));
#else
  return __builtin_shuffle(*reinterpret_cast<const vw*>(table.values), index);
#endif
}

// Pair i of a unit as bf16: k = 2i in the low half of each lane. `zero` has the zero point in every byte.
template <Element E>
INLINE vu pair_of(const char* unit, int v, int i, vu zero) {
  vu code = load_bits(unit + v * (VL * 4));
  if constexpr (E == Element::bf16) return code;
  if constexpr (E == Element::int4 || E == Element::e2m1) return (vu)look_up(kTable<E>, (vw)(code >> (4 * i)));
  if constexpr (E == Element::int4_zero) {
    // Bytes less their zero, pairs 0 and 2 or 1 and 3 at once: a lookup takes no more than the low one's five bits.
    vb4 pairs = (vb4)((i % 2 ? code >> 4 : code) & 0x0f0f0f0fu) - (vb4)zero;
    return (vu)look_up(kTable<E>, (vw)((vu)pairs >> (i / 2 * 8)));
  }
  if constexpr (E == Element::fp8) {
    vw bytes = (vw)code;
    vw magnitude = (vw)((vu)(i == 0 ? bytes << 4 : bytes >> 4) & 0x07f007f0u);
    vw sign = (vw)((vu)(i == 0 ? bytes << 8 : bytes) & 0x80008000u);
    vw exponent = (vw)(code & (i == 0 ? 0x00780078u : 0x78007800u));
    vw small = look_up(kTable<E>, i == 0 ? bytes : bytes >> 8);
    return (vu)((exponent == 0 ? small : magnitude + 0x3c00) | sign);
  }
  if constexpr (E == kFp8Bytes) {
    vu low = look_up_bytes(kByteTables.low, code), high = look_up_bytes(kByteTables.high, code) | (code & 0x80808080u);
    return i == 0 ? (low & 0x00ff00ffu) | (vu)((vw)high << 8) : (high & 0xff00ff00u) | (vu)((vw)low >> 8);
  }
}
INLINE vu spread_zero(const uint8_t* p) { return load_bytes(p) * 0x01010101u; }
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

#ifdef HAS_DOT_BF16
constexpr Element kWide = Element::bf16;  // what codes are widened to
constexpr Path kWidePath = Path::dot_bf16;
#else
constexpr Element kWide = Element::f32;
constexpr Path kWidePath = Path::f32;
#endif

// A block of some panels: `units` of each, in groups of group_units, of which the last may have fewer.
struct CodedTile {
  const void* a;
  int64_t a_stride;
  const char* w;
  int64_t panel_bytes, units, group_units;
  int64_t ahead;  // bytes from w to the codes that are needed next, to be prefetched; 0: none
  const uint8_t* zeros;  // of the first group, the next one's behind them
  int64_t zero_step;     // bytes from one panel's to the next one's
  float* c;
  int64_t c_stride;
  const char* scales;  // as zeros; null: none, and one group
  int64_t scale_step;
  ScaleType scale_type;
  const float* row_scales;  // of the rows of x for the first group; null: none, and so without scales
  int64_t row_scale_step;
  char* wide;  // where a tile that keeps what it widens leaves it, as panels of kWide
};

// c += scale * row_scale * the sum over a group, group by group; where there are no scales, the sum goes on from c.
template <Element E, int R, int B, bool Keep = false>
__attribute__((noinline)) static void coded_tile(const CodedTile& t) {
  constexpr int V = B * kVecs, unit = int(unit_of(E));
  constexpr int64_t bytes = unit_bytes(E);
  const char* w = t.w;
  const Act* a = static_cast<const Act*>(t.a);
  [[maybe_unused]] char* wide = t.wide;
  for (int64_t left = t.units, group = 0; left > 0; left -= t.group_units, ++group) {
    vf acc[R][V];
    vu zero[V] = {};
    UNROLL for (int v = 0; v < V; ++v) {
      UNROLL for (int r = 0; r < R; ++r) acc[r][v] = t.scales ? vf{} : load(t.c + r * t.c_stride + v * VL);
      if (E == Element::int4_zero) zero[v] = spread_zero(t.zeros + group * kPanel + v / kVecs * t.zero_step + v % kVecs * VL);
    }
    for (int64_t u = min1(left, t.group_units); u > 0; --u, w += bytes, a += unit) {
      if constexpr (E != kWide) {
        UNROLL for (int p = 0; p < B; ++p) prefetch_l2(w + p * t.panel_bytes + t.ahead);
      }
#ifdef HAS_DOT_BF16
      UNROLL for (int i = 0; i < unit / 2; ++i) {
        vu weights[V];
        UNROLL for (int v = 0; v < V; ++v) weights[v] = pair_of<E>(w + v / kVecs * t.panel_bytes, v % kVecs, i, zero[v]);
        if constexpr (Keep) {
          UNROLL for (int v = 0; v < V; ++v) *reinterpret_cast<vu*>(wide + v * t.units * (unit * kPanel * 2)) = weights[v];
          wide += 64;
        }
        UNROLL for (int r = 0; r < R; ++r) {
          uint32_t x;
          __builtin_memcpy(&x, a + r * t.a_stride + i * 2, 4);
          UNROLL for (int v = 0; v < V; ++v) accumulate_pairs(acc[r][v], weights[v], x);
        }
      }
#else
      // Not unrolled: a shift by a register costs no more, and there are many of these functions.
      _Pragma("GCC unroll 1") for (int i = 0; i < unit; ++i) {
        vf weights[V];
        UNROLL for (int v = 0; v < V; ++v) weights[v] = value_of<E>(w + v / kVecs * t.panel_bytes, v % kVecs, i, zero[v]);
        UNROLL for (int r = 0; r < R; ++r) {
          UNROLL for (int v = 0; v < V; ++v) accumulate(acc[r][v], weights[v], splat(a[r * t.a_stride + i]));
          if (R > 2) asm volatile("" ::: "memory");  // as in `tile`
        }
      }
#endif
    }
    if (t.row_scales) {
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) acc[r][v] *= splat(t.row_scales[r * t.row_scale_step + group]);
      }
    }
    if (t.scales) {
      const char* scales = t.scales + group * kPanel * scale_bytes(t.scale_type);
      vf scale[V];
      UNROLL for (int v = 0; v < V; ++v) scale[v] = load_scales(scales + v / kVecs * t.scale_step, t.scale_type, v % kVecs * VL);
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) {
          float* c = t.c + r * t.c_stride + v * VL;
          store(c, acc[r][v] * scale[v] + load(c));
        }
      }
    } else {
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) store(t.c + r * t.c_stride + v * VL, acc[r][v]);
      }
    }
  }
}

using CodedTileFn = void (*)(const CodedTile&);

// Tiles of 1 .. kCodedRows rows over coded_panels panels, the larger ones also such as keep, and of one row over one panel.
template <Element E>
struct CodedTiles {
  CodedTileFn many[kCodedRows + 1] = {}, keeping[kCodedRows + 1] = {};
  CodedTileFn one = coded_tile<E, 1, 1>;
  constexpr CodedTiles() { fill<kCodedRows>(); }
  template <int R>
  constexpr void fill() {
    many[R] = coded_tile<E, R, coded_panels(R)>;
    if constexpr (kTilesWiden && R >= kCodedRows / 2) keeping[R] = coded_tile<E, R, coded_panels(R), true>;
    if constexpr (R > 1) fill<R - 1>();
  }
};

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
    for (int i = 0; i < unit_of(E); ++i, out += 64) {
      UNROLL for (int v = 0; v < kVecs; ++v) store(reinterpret_cast<float*>(out) + v * VL, value_of<E>(w, v, i, zero[v]));
    }
#endif
  }
}
