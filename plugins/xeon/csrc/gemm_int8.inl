// The register tiles of int8 weights: quads of k, summed exactly in 32 bits. VPDPBUSD multiplies unsigned by signed bytes, so
// activations are offset by 128 and the column's sum is taken off at the end. Without it both are widened to 16 bits: VPMADDUBSW
// would saturate, as 255 * 127 * 2 does not fit 16 bits.

typedef int16_t vs __attribute__((vector_size(VL * 4), may_alias, aligned(4)));

#ifdef HAS_DOT_BF16
INLINE void accumulate_quads(vi& sum, vu w, uint32_t x) {
#ifdef EMULATE_AVX512
  UNROLL for (int i = 0; i < 32; i += 8) sum += ((vi)(w << (24 - i)) >> 24) * int32_t(x >> i & 255);
#else
  sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(int(x)), (__m512i)w);
#endif
}
#else
INLINE vi multiply_pairs(vs a, vs b) {
#if VL == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(EMULATE_AVX512)
  vi even_ = ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16);
  return even_ + ((vi)a >> 16) * ((vi)b >> 16);
#else
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#endif

// c[r, panel * 16 + j] (+)= sum over `quads` of a[r, k] * w[panel, k, j], in 32 bits.
template <int R, int B>
__attribute__((noinline)) static void tile_int8(
    const ActInt8* a, int64_t a_stride, const char* w, int64_t panel_bytes, int64_t quads, int32_t* c, int64_t c_stride, bool add) {
  constexpr int V = B * kVecs;
  vi acc[R][V];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) acc[r][v] = add ? (vi)load_bits(c + r * c_stride + v * VL) : vi{};
  }
  for (int64_t q = 0; q < quads; ++q, w += 64, a += 4) {
#ifdef HAS_DOT_BF16
    vu weights[V];
    UNROLL for (int v = 0; v < V; ++v) weights[v] = load_bits(w + v / kVecs * panel_bytes + v % kVecs * (VL * 4));
    UNROLL for (int r = 0; r < R; ++r) {
      uint32_t x;
      __builtin_memcpy(&x, a + r * a_stride, 4);
      UNROLL for (int v = 0; v < V; ++v) accumulate_quads(acc[r][v], weights[v], x);
    }
#else
    UNROLL for (int half = 0; half < 2; ++half) {
      vs weights[V];
      UNROLL for (int v = 0; v < V; ++v) {
        vs bytes = (vs)load_bits(w + v / kVecs * panel_bytes + v % kVecs * (VL * 4));
        weights[v] = half == 0 ? bytes << 8 >> 8 : bytes >> 8;
      }
      UNROLL for (int r = 0; r < R; ++r) {
        uint32_t x;
        __builtin_memcpy(&x, a + r * a_stride + half * 2, 4);
        UNROLL for (int v = 0; v < V; ++v) acc[r][v] += multiply_pairs(weights[v], (vs)((vu){} + x));
        if (R > 2) asm volatile("" ::: "memory");
      }
    }
#endif
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) *reinterpret_cast<vi*>(c + r * c_stride + v * VL) = acc[r][v];
  }
}

using Int8TileFn = void (*)(const ActInt8*, int64_t, const char*, int64_t, int64_t, int32_t*, int64_t, bool);

struct Int8Tiles {
  Int8TileFn many[kMaxRows + 1] = {};
  Int8TileFn one[kMaxRows + 1] = {};
  constexpr Int8Tiles() { fill<kMaxRows>(); }
  template <int R>
  constexpr void fill() {
    many[R] = tile_int8<R, panels_at_once(R)>;
    one[R] = tile_int8<R, 1>;
    if constexpr (R > 1) fill<R - 1>();
  }
};

// As `multiply`, in place: sums of codes become floats.
INLINE void scale_int8(const Weight& w, const Activations& x, int64_t row, int64_t panel, float* c, int64_t width) {
  float scale = x.row_scale[row];
  int32_t zero = x.row_zero[row];
  for (int64_t j = 0; j < width; j += VL) {
    int64_t column = panel * kPanel + j;
    vi total = (vi)load_bits(c + j) - (vi)load_bits(w.column_sum + column) * zero;
    store(c + j, __builtin_convertvector(total, vf) * splat(scale) * load(w.column_scale + column));
  }
}
