// gemm.linear and gemm.linear_gated: activations prepared, then `multiply` over row blocks and panels, the bias, and the gate.

#include "multiply.inl"

struct LinearTask {
  const LinearArgs* args;
  Activations x;
  int64_t row_blocks, panels, panels_per_task;
};

INLINE void store(_Float16* p, vf x) {
  UNROLL for (int i = 0; i < VL; ++i) p[i] = _Float16(x[i]);
}
INLINE void store1(_Float16* p, float x) { *p = _Float16(x); }

// The first `count` of 16 sums, rounded.
template <typename T>
INLINE void write_columns(const float* c, int64_t count, T* out) {
  if (count == kPanel) {
    UNROLL for (int v = 0; v < kVecs; ++v) store(out + v * VL, load(c + v * VL));
  } else {
    for (int64_t j = 0; j < count; ++j) store1(out + j, c[j]);
  }
}

// x rounded to T.
template <typename T>
INLINE vf rounded(vf x) {
  if constexpr (__is_same(T, uint16_t)) return (vf)(round_bf16(x) << 16);
  if constexpr (__is_same(T, _Float16))
    for (int i = 0; i < VL; ++i) x[i] = float(_Float16(x[i]));
  return x;
}

// Of one panel's columns.
static void load_bias(const LinearArgs& args, int64_t column, int64_t count, float* bias) {
  for (int64_t j = 0; j < kPanel; ++j) bias[j] = args.bias && j < count ? load1(args.bias, args.bias_dtype, column + j) : 0.0f;
}

// Sums of some panels, with the bias added, rounded into the output.
template <typename T>
static void write_sums(const LinearArgs& args, float* c, int64_t c_stride, int64_t row, int64_t rows, int64_t column, int64_t width) {
  for (int64_t end = min1(column + width, args.w.n); column < end; column += kPanel, c += kPanel) {
    float bias[kPanel];
    int64_t count = min1(kPanel, end - column);
    load_bias(args, column, count, bias);
    for (int64_t r = 0; r < rows; ++r) {
      float* sums = c + r * c_stride;
      UNROLL for (int v = 0; v < kVecs; ++v) store(sums + v * VL, load(sums + v * VL) + load(bias + v * VL));
      write_columns(sums, count, static_cast<T*>(args.out.data) + (row + r) * args.out.stride + column);
    }
  }
}

// The same of gates and of what they open: both are rounded, as between two kernels, then gate(g) * u is.
template <typename T>
static void write_gated(
    const LinearArgs& args, float* gates, const float* ups, int64_t c_stride, int64_t row, int64_t rows, int64_t column, int64_t width) {
  int64_t half = args.w.n / 2;
  for (int64_t end = min1(column + width, half); column < end; column += kPanel, gates += kPanel, ups += kPanel) {
    float gate_bias[kPanel], up_bias[kPanel];
    int64_t count = min1(kPanel, end - column);
    load_bias(args, column, count, gate_bias), load_bias(args, half + column, count, up_bias);
    for (int64_t r = 0; r < rows; ++r) {
      float* g = gates + r * c_stride;
      const float* u = ups + r * c_stride;
      UNROLL for (int v = 0; v < kVecs; ++v) {
        vf up = rounded<T>(load(u + v * VL) + load(up_bias + v * VL));
        store(g + v * VL, gate(rounded<T>(load(g + v * VL) + load(gate_bias + v * VL)), args.gate) * up);
      }
      write_columns(g, count, static_cast<T*>(args.out.data) + (row + r) * args.out.stride + column);
    }
  }
}

template <typename T>
static void linear_task(const void* opaque, int64_t index) {
  const LinearTask& t = *static_cast<const LinearTask*>(opaque);
  const LinearArgs& args = *t.args;
  // Row blocks of one group of panels follow each other, so that its weights come from L3 for all but the first.
  int64_t block = row_block(args.w, args.tiles), row = index % t.row_blocks * block, rows = min1(block, args.m - row);
  int64_t panel = index / t.row_blocks * t.panels_per_task, end = min1(panel + t.panels_per_task, t.panels);
  // Few rows take all panels at once: of codes `multiply` then fetches a step's first during the step before, and what gates
  // open is a long stream of its own.
  bool gated = args.gate != Gate::none;
  int64_t step = rows <= (gated ? kMaxRows : is_coded(args.w) ? kCodedRows : 0) ? end - panel : panels_per_step(args.w, rows);
  int64_t c_stride = (gated ? 2 * step + 1 : step) * kPanel, half = args.w.n / 2;
  float* c = static_cast<float*>(scratch(kSlotTile, size_t(rows * c_stride) * sizeof(float)));
  for (; panel < end; panel += step) {
    int64_t count = min1(step, end - panel), column = panel * kPanel, width = count * kPanel;
    int64_t then = t.row_blocks == 1 && panel + count < t.panels ? panel + count : -1;
    if (!gated) {
      multiply(args.w, t.x, row, rows, panel, count, c, c_stride, args.tiles, then);
      write_sums<T>(args, c, c_stride, row, rows, column, width);
      continue;
    }
    // What the gates open lies `half` columns further on, which may be within a panel.
    int64_t up = half + column, shift = up % kPanel, panels = ceil_div(shift + min1(width, half - column), kPanel);
    multiply(args.w, t.x, row, rows, panel, count, c, c_stride, args.tiles, up / kPanel);
    multiply(args.w, t.x, row, rows, up / kPanel, panels, c + width, c_stride, args.tiles, then);
    write_gated<T>(args, c, c + width + shift, c_stride, row, rows, column, width);
  }
}

static void prepare_task(const void* opaque, int64_t row) {
  const LinearTask& t = *static_cast<const LinearTask*>(opaque);
  prepare_row(t.args->x, row, t.args->w, t.args->quantize, t.args->x_scale, t.x, row);
}

constexpr int64_t kL1Way = 4096;  // bytes: rows so far apart share their sets, and eight of them at most stay

// Whether the tiles can read x where it is.
INLINE bool reads_as_is(const Rows& x, const Weight& w, Quantize kind, int64_t m) {
  constexpr DType wanted = sizeof(Act) == 2 ? DType::bf16 : DType::f32;
  bool spread = m < kRowBlock || x.stride * int64_t(sizeof(Act)) % kL1Way != 0;
  return kind == Quantize::as_is && !w.order && w.k == w.k_padded && x.dtype == wanted && spread;
}

static void linear(const LinearArgs& args) {
  LinearTask t{};
  t.args = &args;
  // AMX reads rows in steps of 32, and where x ends it finds what is next in memory.
  if (reads_as_is(args.x, args.w, args.quantize, args.m) && !(args.tiles && args.w.k % 32)) {
    t.x = {args.x.data, args.x.stride, nullptr, nullptr, nullptr};
  } else {
    int64_t bytes = lay_out(args.w, args.quantize, args.m, nullptr, t.x);
    lay_out(args.w, args.quantize, args.m, scratch(kSlotActivations, size_t(bytes)), t.x);
    if (args.m <= 4) {
      for (int64_t m = 0; m < args.m; ++m) prepare_task(&t, m);
    } else {
      run_tasks(args.m, prepare_task, &t);
    }
  }
  t.row_blocks = ceil_div(args.m, row_block(args.w, args.tiles));
  bool gated = args.gate != Gate::none;
  t.panels = ceil_div(gated ? args.w.n / 2 : args.w.n, kPanel);
  // Enough tasks that a slow thread holds the others up by little; enough bytes in one, as of 8 panels of bf16, that a stream
  // stays long.
  Element element = args.w.element;
  int64_t wanted = 12 * num_threads(), longest = 8 * max1(int64_t(1), unit_of(element) * kPanel * 2 / unit_bytes(element));
  int64_t per_task = max1(int64_t(1), min1(gated ? longest / 2 : longest, t.panels * t.row_blocks / wanted));
  int64_t step = panels_per_step(args.w, min1(args.m, row_block(args.w, args.tiles)));
  t.panels_per_task = ceil_div(per_task, step) * step;
  Task task = args.out.dtype == DType::bf16 ? linear_task<uint16_t> : args.out.dtype == DType::f32 ? linear_task<float> : linear_task<_Float16>;
  int64_t count = t.row_blocks * ceil_div(t.panels, t.panels_per_task);
  t.row_blocks == 1 ? run_stream(count, task, &t) : run_tasks(count, task, &t);
}
