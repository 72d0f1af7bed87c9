// The register tiles of matrix products over panels of floats. One packed copy of the weights serves every M: a decode step streams each panel once, a prefill reuses a
// panel block from L1 for up to kRowBlock rows. Every output is one float32 sum over k in ascending order, whatever M is
// and however the work is cut, so a row's result does not depend on its neighbours.

constexpr int kVecs = 16 / VL;        // vectors across a panel
constexpr int kMaxRows = VL == 16 ? 12 : 6;  // rows of a register tile; kMaxRows x panels x kVecs accumulators
constexpr int64_t kDepth = 512;       // k a block covers: 16 KB of bf16 panel, half of L1
constexpr int64_t kRowBlock = 96;     // rows a task covers: its block of activations stays in L2
static_assert(kRowBlock % kMaxRows == 0 && kDepth % 2 == 0, "blocks hold whole tiles");

// Panels that a tile of `rows` rows takes at once: with few rows, more panels keep enough sums in flight to hide the
// latency of FMA without splitting a sum.
constexpr int panels_at_once(int rows) {
  if (VL == 16) return rows <= 1 ? 8 : rows <= 6 ? 4 : 2;
  return rows <= 1 ? 4 : rows <= 3 ? 2 : 1;
}

enum class Path { f32, bf16, dot_bf16 };  // weights float32; bf16 widened in registers; bf16 pairs with VDPBF16PS

// c[r, panel * 16 + j] (+)= sum over k of a[r, k] * w[panel, k, j].
template <Path P, int R, int B>
__attribute__((noinline)) static void tile(
    const void* a_, int64_t a_stride, const char* w, int64_t panel_bytes, int64_t pairs, float* c, int64_t c_stride, bool add) {
  constexpr int V = B * kVecs;
  vf acc[R][V];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) acc[r][v] = add ? load(c + r * c_stride + v * VL) : vf{};
  }
  constexpr int64_t pair_bytes = P == Path::f32 ? 128 : 64;
  constexpr int64_t a_size = P == Path::dot_bf16 ? 2 : 4;
  const char* a = static_cast<const char*>(a_);
  for (int64_t p = 0; p < pairs; ++p) {
    const char* ap = a + p * 2 * a_size;
    const char* wp = w + p * pair_bytes;
#ifdef HAS_DOT_BF16
    vu weights[V];
    UNROLL for (int v = 0; v < V; ++v) weights[v] = load_bits(wp + (v / kVecs) * panel_bytes + (v % kVecs) * (VL * 4));
    UNROLL for (int r = 0; r < R; ++r) {
      uint32_t x;
      __builtin_memcpy(&x, ap + r * a_stride * a_size, 4);
      UNROLL for (int v = 0; v < V; ++v) accumulate_pairs(acc[r][v], weights[v], x);
    }
#else
    // One k after the other, a row at a time: sums, weights and one activation just fill the 16 registers of AVX2. The
    // barriers keep the compiler from hoisting the loads of a whole pair, and so spilling sums to make room.
    UNROLL for (int half = 0; half < 2; ++half) {
      vf weights[V];
      UNROLL for (int v = 0; v < V; ++v) {
        const char* at = wp + (v / kVecs) * panel_bytes + (v % kVecs) * (VL * 4);
        if constexpr (P == Path::f32)
          weights[v] = load(reinterpret_cast<const float*>(at + half * 64));
        else
          weights[v] = half == 0 ? even(load_bits(at)) : odd_lean(load_bits(at));
      }
      UNROLL for (int r = 0; r < R; ++r) {
        float x = reinterpret_cast<const float*>(ap)[r * a_stride + half];
        UNROLL for (int v = 0; v < V; ++v) accumulate(acc[r][v], weights[v], splat(x));
        if (R > 2) asm volatile("" ::: "memory");
      }
    }
#endif
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) store(c + r * c_stride + v * VL, acc[r][v]);
  }
}

using TileFn = void (*)(const void*, int64_t, const char*, int64_t, int64_t, float*, int64_t, bool);

// Tiles of 1 .. kMaxRows rows, over panels_at_once panels and over one.
template <Path P>
struct Tiles {
  TileFn many[kMaxRows + 1] = {};
  TileFn one[kMaxRows + 1] = {};
  constexpr Tiles() { fill<kMaxRows>(); }
  template <int R>
  constexpr void fill() {
    many[R] = tile<P, R, panels_at_once(R)>;
    one[R] = tile<P, R, 1>;
    if constexpr (R > 1) fill<R - 1>();
  }
};

// Rows in even groups of at most kMaxRows: 8 rows are 4 + 4, not 6 + 2.
INLINE int64_t group_start(int64_t rows, int64_t groups, int64_t g) { return rows * g / groups; }
