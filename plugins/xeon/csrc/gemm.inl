// gemm.linear. One packed copy of the weights serves every M: a decode step streams each panel once, a prefill reuses a
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

struct LinearTask {
  const LinearArgs* args;
  const void* a;  // activations as the tiles read them: float32, or bf16 pairs
  int64_t a_stride, a_size;
  const TileFn *many, *one;
  int64_t panel_bytes, pair_bytes, pairs;
  int64_t row_blocks, panels, panels_per_task;
};

// Rows in even groups of at most kMaxRows: 8 rows are 4 + 4, not 6 + 2.
INLINE int64_t group_start(int64_t rows, int64_t groups, int64_t g) { return rows * g / groups; }

template <typename T>
static void write_panel(const LinearArgs& args, const float* c, int64_t c_stride, int64_t row, int64_t rows, int64_t column) {
  int64_t width = min1(kPanel, args.n - column);
  float bias[kPanel] = {};
  if (args.bias)
    for (int64_t j = 0; j < width; ++j) bias[j] = load1(args.bias, args.bias_dtype, column + j);
  for (int64_t r = 0; r < rows; ++r) {
    T* out = static_cast<T*>(args.out.data) + (row + r) * args.out.stride + column;
    const float* sums = c + r * c_stride;
    if (width == kPanel) {
      UNROLL for (int v = 0; v < kVecs; ++v) store(out + v * VL, load(sums + v * VL) + load(bias + v * VL));
    } else {
      for (int64_t j = 0; j < width; ++j) store1(out + j, sums[j] + bias[j]);
    }
  }
}

static void linear_task(const void* opaque, int64_t index) {
  const LinearTask& t = *static_cast<const LinearTask*>(opaque);
  const LinearArgs& args = *t.args;
  // Row blocks of one group of panels follow each other, so that its weights come from L3 for all but the first.
  int64_t row = index % t.row_blocks * kRowBlock, rows = min1(kRowBlock, args.m - row);
  int64_t panel0 = index / t.row_blocks * t.panels_per_task;
  int64_t panels = min1(t.panels_per_task, t.panels - panel0);
  int64_t groups = ceil_div(rows, kMaxRows);
  int64_t step = panels_at_once(int(ceil_div(rows, groups)));  // of the largest group; smaller ones may take no fewer
  int64_t c_stride = step * kPanel;
  float* c = static_cast<float*>(scratch(kSlotTile, size_t(rows * c_stride) * sizeof(float)));
  const char* w = static_cast<const char*>(args.w);
  for (int64_t p = 0; p < panels; p += step) {
    int64_t count = min1(step, panels - p);
    const char* block = w + (panel0 + p) * t.panel_bytes;
    for (int64_t pair = 0; pair < t.pairs; pair += kDepth / 2) {
      int64_t pairs = min1(kDepth / 2, t.pairs - pair);
      for (int64_t g = 0; g < groups; ++g) {
        int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
        const char* a = static_cast<const char*>(t.a) + ((row + start) * t.a_stride + pair * 2) * t.a_size;
        const char* wp = block + pair * t.pair_bytes;
        float* cp = c + start * c_stride;
        if (count == panels_at_once(int(size))) {
          t.many[size](a, t.a_stride, wp, t.panel_bytes, pairs, cp, c_stride, pair > 0);
        } else {
          for (int64_t i = 0; i < count; ++i)
            t.one[size](a, t.a_stride, wp + i * t.panel_bytes, t.panel_bytes, pairs, cp + i * kPanel, c_stride, pair > 0);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      int64_t column = (panel0 + p + i) * kPanel;
      if (args.out.dtype == DType::bf16)
        write_panel<uint16_t>(args, c + i * kPanel, c_stride, row, rows, column);
      else
        write_panel<float>(args, c + i * kPanel, c_stride, row, rows, column);
    }
  }
}

struct WidenTask {
  Rows x;
  void* out;
  int64_t width, stride;
  bool keep_bf16;
};

// One row of activations as the tiles read it, zero from `width` to the end of the last pair.
static void widen_task(const void* opaque, int64_t row) {
  const WidenTask& t = *static_cast<const WidenTask*>(opaque);
  if (t.keep_bf16) {
    uint16_t* out = static_cast<uint16_t*>(t.out) + row * t.stride;
    __builtin_memcpy(out, static_cast<const uint16_t*>(t.x.data) + row * t.x.stride, size_t(t.width) * 2);
    out[t.width] = 0;
    return;
  }
  float* out = static_cast<float*>(t.out) + row * t.stride;
  if (t.x.dtype == DType::bf16) {
    const uint16_t* x = static_cast<const uint16_t*>(t.x.data) + row * t.x.stride;
    int64_t i = 0;
    for (; i + VL <= t.width; i += VL) store(out + i, load_bf16(x + i));
    for (; i < t.width; ++i) out[i] = to_float(x[i]);
  } else {
    __builtin_memcpy(out, static_cast<const float*>(t.x.data) + row * t.x.stride, size_t(t.width) * 4);
  }
  out[t.width] = 0.0f;
}

template <Path P>
static void linear_path(const LinearArgs& args) {
  static constexpr Tiles<P> tiles;
  LinearTask t;
  t.args = &args;
  t.many = tiles.many, t.one = tiles.one;
  t.pairs = ceil_div(args.k, 2);
  t.pair_bytes = P == Path::f32 ? 128 : 64;
  t.panel_bytes = t.pairs * t.pair_bytes;
  t.a_size = P == Path::dot_bf16 ? 2 : 4;

  bool as_is = args.k % 2 == 0 && (args.x.dtype == DType::f32 || P == Path::dot_bf16);
  if (as_is) {
    t.a = args.x.data, t.a_stride = args.x.stride;
  } else {
    // 16 more elements a row: rows a power of two apart would share their L1 sets.
    t.a_stride = t.pairs * 2 + 16;
    void* a = scratch(kSlotActivations, size_t(args.m * t.a_stride * t.a_size));
    WidenTask widen{args.x, a, args.k, t.a_stride, P == Path::dot_bf16};
    if (args.m <= 4) {
      for (int64_t m = 0; m < args.m; ++m) widen_task(&widen, m);
    } else {
      run_tasks(args.m, widen_task, &widen);
    }
    t.a = a;
  }

  t.row_blocks = ceil_div(args.m, kRowBlock);
  t.panels = ceil_div(args.n, kPanel);
  // Enough tasks that a slow thread holds the others up by little; enough panels in one that a stream stays long.
  int64_t wanted = 12 * num_threads();
  int64_t per_task = max1(int64_t(1), min1(int64_t(8), t.panels * t.row_blocks / wanted));
  int64_t step = panels_at_once(int(min1(args.m, kMaxRows)));
  t.panels_per_task = ceil_div(per_task, step) * step;
  run_tasks(t.row_blocks * ceil_div(t.panels, t.panels_per_task), linear_task, &t);
}

#ifndef HAS_DOT_BF16
static void linear(const LinearArgs& args) {
  if (args.w_dtype == DType::f32)
    linear_path<Path::f32>(args);
  else
    linear_path<Path::bf16>(args);
}

template <typename T>
static void pack_panel(const PackArgs& args, int64_t panel) {
  constexpr bool paired = sizeof(T) == 2;
  int64_t pairs = ceil_div(args.k, 2), columns = min1(kPanel, args.n - panel * kPanel);
  T* packed = static_cast<T*>(args.packed) + panel * pairs * 2 * kPanel;
  T* w = static_cast<T*>(const_cast<void*>(args.w.data)) + panel * kPanel * args.w.stride;
  for (int64_t k = 0; k < pairs * 2; ++k) {
    for (int64_t j = 0; j < kPanel; ++j) {
      T& slot = packed[paired ? (k / 2 * kPanel + j) * 2 + k % 2 : k * kPanel + j];
      bool inside = j < columns && k < args.k;
      if (!args.unpack)
        slot = inside ? w[j * args.w.stride + k] : T(0);
      else if (inside)
        w[j * args.w.stride + k] = slot;
    }
  }
}

static void pack_task(const void* opaque, int64_t panel) {
  const PackArgs& args = *static_cast<const PackArgs*>(opaque);
  if (args.w.dtype == DType::bf16)
    pack_panel<uint16_t>(args, panel);
  else
    pack_panel<float>(args, panel);
}

static void pack(const PackArgs& args) { run_tasks(ceil_div(args.n, kPanel), pack_task, &args); }
#endif
