// gemm.linear: activations prepared, then `multiply` over row blocks and panels, and the bias.

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

// Sums of one panel, with the bias added, rounded into the output.
template <typename T>
static void write_panel(const LinearArgs& args, const float* c, int64_t c_stride, int64_t row, int64_t rows, int64_t column) {
  int64_t width = min1(kPanel, args.w.n - column);
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
  int64_t block = row_block(args.w, args.tiles), row = index % t.row_blocks * block, rows = min1(block, args.m - row);
  int64_t panel0 = index / t.row_blocks * t.panels_per_task;
  int64_t panels = min1(t.panels_per_task, t.panels - panel0);
  // Of codes, few rows take all panels at once: `multiply` then fetches a step's first codes during the step before.
  int64_t step = is_coded(args.w) && rows <= kCodedRows ? panels : panels_per_step(args.w, rows), c_stride = step * kPanel;
  float* c = static_cast<float*>(scratch(kSlotTile, size_t(rows * c_stride) * sizeof(float)));
  for (int64_t p = 0; p < panels; p += step) {
    int64_t count = min1(step, panels - p);
    multiply(args.w, t.x, row, rows, panel0 + p, count, c, c_stride, args.tiles);
    for (int64_t i = 0; i < count; ++i) {
      int64_t column = (panel0 + p + i) * kPanel;
      switch (args.out.dtype) {
        case DType::bf16: write_panel<uint16_t>(args, c + i * kPanel, c_stride, row, rows, column); break;
        case DType::f32: write_panel<float>(args, c + i * kPanel, c_stride, row, rows, column); break;
        case DType::f16: write_panel<_Float16>(args, c + i * kPanel, c_stride, row, rows, column); break;
      }
    }
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
  t.panels = ceil_div(args.w.n, kPanel);
  // Enough tasks that a slow thread holds the others up by little; enough bytes in one, as of 8 panels of bf16, that a stream
  // stays long.
  Element element = args.w.element;
  int64_t wanted = 12 * num_threads(), longest = 8 * max1(int64_t(1), unit_of(element) * kPanel * 2 / unit_bytes(element));
  int64_t per_task = max1(int64_t(1), min1(longest, t.panels * t.row_blocks / wanted));
  int64_t step = panels_per_step(args.w, min1(args.m, row_block(args.w, args.tiles)));
  t.panels_per_task = ceil_div(per_task, step) * step;
  run_tasks(t.row_blocks * ceil_div(t.panels, t.panels_per_task), linear_task, &t);
}
