// moe.fused and gemm.grouped: products with a stack of experts, on the tiles of gemm.inl.
//
// Rows are sorted by expert, and the work is cut into (expert, block of rows, block of columns): each expert that has rows is
// read once, by whichever threads are free, and none that has not. moe.fused runs in three sweeps: gate and up and the
// activation, down, and the weighted sum of each token's results in the order of its choices. A task gathers the rows it
// needs, which costs little beside the columns it multiplies them with. A row's result depends on that row alone.

constexpr int64_t kExpertPanels = 8;  // most panels of a task, unless a tile takes more: a long stream of weights

struct ExpertTask {
  int64_t expert, row, rows;  // rows in sorted order
  int64_t panel, panels;
};

struct ExpertCut {
  const ExpertTask* tasks;
  int64_t count;
};

INLINE int64_t tile_panels(int64_t rows) { return panels_at_once(int(ceil_div(rows, ceil_div(rows, kMaxRows)))); }

// starts: [experts + 1], the first sorted row of each.
static ExpertCut cut(const int32_t* starts, int64_t experts, int64_t panels) {
  int64_t blocks = 0;
  for (int64_t e = 0; e < experts; ++e) blocks += ceil_div(starts[e + 1] - starts[e], kRowBlock);
  // Enough tasks that a slow thread holds the others up by little.
  int64_t wanted = max1(int64_t(1), min1(kExpertPanels, blocks * panels / (12 * num_threads())));
  ExpertTask* tasks =
      static_cast<ExpertTask*>(scratch(kSlotPlan, size_t(blocks * ceil_div(panels, wanted)) * sizeof(ExpertTask)));
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t size = starts[e + 1] - starts[e];
    if (size == 0) continue;
    int64_t step = tile_panels(min1(size, kRowBlock)), width = ceil_div(wanted, step) * step;
    // Row blocks of one group of panels follow each other: its weights come from cache for all but the first.
    for (int64_t panel = 0; panel < panels; panel += width)
      for (int64_t row = 0; row < size; row += kRowBlock)
        tasks[count++] = {e, starts[e] + row, min1(kRowBlock, size - row), panel, min1(width, panels - panel)};
  }
  return {tasks, count};
}

// What tiles read activations as.
template <Path P>
struct Operand {
  using type = float;
};
template <>
struct Operand<Path::dot_bf16> {
  using type = uint16_t;
};

// 16 more elements a row: rows a power of two apart would share their L1 sets.
INLINE int64_t operand_stride(int64_t width) { return ceil_div(width, kPanel) * kPanel + 16; }

// x rounded to T.
template <typename T>
INLINE vf rounded(vf x) {
  if constexpr (sizeof(T) == 2) return (vf)(round_bf16(x) << 16);
  return x;
}
template <typename T>
INLINE float rounded1(float x) {
  if constexpr (sizeof(T) == 2) return to_float(to_bf16(x));
  return x;
}

// out = x * weight rounded to T, then a zero, which completes the last pair.
template <typename T, typename O>
static void operand_row(const T* x, int64_t width, float weight, O* out) {
  int64_t i = 0;
  if (weight == 1.0f) {
    for (; i + VL <= width; i += VL) store(out + i, load(x + i));
    for (; i < width; ++i) store1(out + i, load1(x + i));
  } else {
    for (; i + VL <= width; i += VL) store(out + i, rounded<T>(load(x + i) * weight));
    for (; i < width; ++i) store1(out + i, rounded1<T>(load1(x + i) * weight));
  }
  out[width] = O(0);
}

// c[r, j] = sum over k of a[r, k] * w[k, j], over `panels` panels from w on.
template <Path P>
static void product(
    const typename Operand<P>::type* a, int64_t a_stride, int64_t rows, const char* w, int64_t pairs, int64_t panels, float* c,
    int64_t c_stride) {
  static constexpr Tiles<P> tiles;
  constexpr int64_t pair_bytes = P == Path::f32 ? 128 : 64;
  int64_t panel_bytes = pairs * pair_bytes, groups = ceil_div(rows, kMaxRows), step = tile_panels(rows);
  for (int64_t p = 0; p < panels; p += step) {
    int64_t count = min1(step, panels - p);
    for (int64_t pair = 0; pair < pairs; pair += kDepth / 2) {
      int64_t depth = min1(kDepth / 2, pairs - pair);
      for (int64_t g = 0; g < groups; ++g) {
        int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
        const auto* ap = a + start * a_stride + pair * 2;
        const char* wp = w + p * panel_bytes + pair * pair_bytes;
        float* cp = c + start * c_stride + p * kPanel;
        if (count == panels_at_once(int(size))) {
          tiles.many[size](ap, a_stride, wp, panel_bytes, depth, cp, c_stride, pair > 0);
        } else {
          for (int64_t i = 0; i < count; ++i)
            tiles.one[size](ap, a_stride, wp + i * panel_bytes, panel_bytes, depth, cp + i * kPanel, c_stride, pair > 0);
        }
      }
    }
  }
}

template <Path P>
INLINE const char* expert_panel(const ExpertStack& w, int64_t expert, int64_t pairs, int64_t panel) {
  return static_cast<const char*>(w.w) + expert * w.bytes + panel * pairs * (P == Path::f32 ? 128 : 64);
}

// bias[first, first + count) of one expert, zeros where there is none.
static void load_bias(const ExpertStack& w, int64_t expert, int64_t n, int64_t first, int64_t count, float* bias) {
  for (int64_t j = 0; j < count; ++j)
    bias[j] = w.bias && first + j < n ? load1(w.bias, w.bias_dtype, expert * n + first + j) : 0.0f;
}

// The first `count` of 16 sums, rounded.
template <typename T>
INLINE void write_columns(const float* c, int64_t count, T* out) {
  if (count == kPanel) {
    UNROLL for (int v = 0; v < kVecs; ++v) store(out + v * VL, load(c + v * VL));
  } else {
    for (int64_t j = 0; j < count; ++j) store1(out + j, c[j]);
  }
}

// out[j] = c[j] + bias[j], of `count` columns; c and bias are whole panels. c is changed.
template <typename T>
static void write_sums(float* c, const float* bias, int64_t count, T* out) {
  for (int64_t j = 0; j < count; j += kPanel) {
    UNROLL for (int v = 0; v < kVecs; ++v) store(c + j + v * VL, load(c + j + v * VL) + load(bias + j + v * VL));
    write_columns(c + j, min1(kPanel, count - j), out + j);
  }
}

struct ExpertSweeps {
  const ExpertsArgs* args;
  const ExpertTask* tasks;
  const int32_t* order;  // sorted row -> token * top_k + choice
  void* h;               // sorted rows, activated, as operands
  int64_t h_stride;
  void* y;               // [T * top_k, y_stride], x's dtype, as the choices are
  int64_t y_stride;      // whole panels
};

INLINE int64_t local_expert(const ExpertsArgs& a, int64_t choice) {
  int64_t id = a.ids[choice];
  if (a.expert_map) id = id >= 0 && id < a.map_size ? a.expert_map[id] : -1;
  return id < a.num_experts ? id : -1;  // what is out of range is nobody's
}

INLINE vf activated(const ExpertsArgs& a, vf gate_, vf up) {
  if (!a.clamped) return gate(gate_, a.gate) * up;
  vf limit = splat(a.limit);  // in this order of operands a NaN stays one
  gate_ = gate_ > limit ? limit : gate_;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate_ * sigmoid(gate_ * a.alpha) * (up + 1.0f);
}

template <Path P, typename T>
static void gate_up_task(const void* opaque, int64_t index) {
  using O = typename Operand<P>::type;
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  int64_t pairs = ceil_div(a.hidden, 2), x_stride = operand_stride(a.hidden);
  O* x = static_cast<O*>(scratch(kSlotActivations, size_t(t.rows * x_stride) * sizeof(O)));
  for (int64_t r = 0; r < t.rows; ++r) {
    int64_t choice = s.order[t.row + r];
    const T* from = static_cast<const T*>(a.x.data) + choice / a.top_k * a.x.stride;
    operand_row(from, a.hidden, a.weight_on_input ? a.weights[choice] : 1.0f, x + r * x_stride);
  }
  // A tile's worth of gate columns at a time, and the panels that hold the up columns beside them.
  int64_t step = tile_panels(t.rows), c_stride = (2 * step + 1) * kPanel;
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 2) * c_stride) * sizeof(float)));
  float *gate_bias = c + t.rows * c_stride, *up_bias = gate_bias + c_stride;
  for (int64_t p = t.panel; p < t.panel + t.panels; p += step) {
    int64_t count = min1(step, t.panel + t.panels - p), first = p * kPanel;
    int64_t columns = min1(count * kPanel, a.width - first);
    int64_t up = a.width + first, shift = up % kPanel;
    product<P>(x, x_stride, t.rows, expert_panel<P>(a.w13, t.expert, pairs, p), pairs, count, c, c_stride);
    product<P>(
        x, x_stride, t.rows, expert_panel<P>(a.w13, t.expert, pairs, up / kPanel), pairs, ceil_div(shift + columns, kPanel),
        c + count * kPanel, c_stride);
    load_bias(a.w13, t.expert, 2 * a.width, first, count * kPanel, gate_bias);
    load_bias(a.w13, t.expert, 2 * a.width, up, count * kPanel, up_bias);
    for (int64_t r = 0; r < t.rows; ++r) {
      const float *gates = c + r * c_stride, *ups = gates + count * kPanel + shift;
      O* h = static_cast<O*>(s.h) + (t.row + r) * s.h_stride + first;
      for (int64_t j = 0; j < count * kPanel; j += VL) {
        vf g = rounded<T>(load(gates + j) + load(gate_bias + j)), u = rounded<T>(load(ups + j) + load(up_bias + j));
        store(h + j, rounded<T>(activated(a, g, u)));
      }
      for (int64_t j = columns; j < count * kPanel; ++j) h[j] = O(0);  // the tiles read the first of them
    }
  }
}

template <Path P, typename T>
static void down_task(const void* opaque, int64_t index) {
  using O = typename Operand<P>::type;
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  int64_t pairs = ceil_div(a.width, 2), first = t.panel * kPanel, c_stride = t.panels * kPanel;
  int64_t columns = min1(c_stride, a.hidden - first);
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 1) * c_stride) * sizeof(float)));
  float* bias = c + t.rows * c_stride;
  const O* h = static_cast<const O*>(s.h) + t.row * s.h_stride;
  product<P>(h, s.h_stride, t.rows, expert_panel<P>(a.w2, t.expert, pairs, t.panel), pairs, t.panels, c, c_stride);
  load_bias(a.w2, t.expert, a.hidden, first, c_stride, bias);
  for (int64_t r = 0; r < t.rows; ++r)
    write_sums(c + r * c_stride, bias, columns, static_cast<T*>(s.y) + s.order[t.row + r] * s.y_stride + first);
}

template <typename T>
static void combine_task(const void* opaque, int64_t token) {
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  T* out = static_cast<T*>(a.out.data) + token * a.out.stride;
  for (int64_t first = 0; first < a.hidden; first += kPanel) {
    vf sums[kVecs] = {};
    for (int64_t choice = token * a.top_k; choice < (token + 1) * a.top_k; ++choice) {
      if (local_expert(a, choice) < 0) continue;
      vf weight = splat(a.weight_on_input ? 1.0f : a.weights[choice]);
      const T* y = static_cast<const T*>(s.y) + choice * s.y_stride + first;
      UNROLL for (int v = 0; v < kVecs; ++v) sums[v] += load(y + v * VL) * weight;
    }
    float row[kPanel];
    UNROLL for (int v = 0; v < kVecs; ++v) store(row + v * VL, sums[v]);
    write_columns(row, min1(kPanel, a.hidden - first), out + first);
  }
}

template <Path P, typename T>
static void experts_path(const ExpertsArgs& args) {
  using O = typename Operand<P>::type;
  int64_t choices = args.tokens * args.top_k;
  ExpertSweeps s;
  s.args = &args;
  s.h_stride = operand_stride(args.width), s.y_stride = ceil_div(args.hidden, kPanel) * kPanel;
  // Sorted by counting: starts[e + 1] counts, then says where expert e goes on, and at last where it ends.
  int32_t* starts = static_cast<int32_t*>(scratch(kSlotExperts, size_t(args.num_experts + 2 + choices) * sizeof(int32_t)));
  int32_t* order = starts + args.num_experts + 2;
  for (int64_t e = 0; e < args.num_experts + 2; ++e) starts[e] = 0;
  for (int64_t i = 0; i < choices; ++i)
    if (int64_t e = local_expert(args, i); e >= 0) ++starts[e + 2];
  for (int64_t e = 2; e < args.num_experts + 2; ++e) starts[e] += starts[e - 1];
  for (int64_t i = 0; i < choices; ++i)
    if (int64_t e = local_expert(args, i); e >= 0) order[starts[e + 1]++] = int32_t(i);
  s.order = order;
  size_t h_bytes = (size_t(choices * s.h_stride) * sizeof(O) + 63) / 64 * 64;
  char* buffer = static_cast<char*>(scratch(kSlotHidden, h_bytes + size_t(choices * s.y_stride) * sizeof(T)));
  s.h = buffer, s.y = buffer + h_bytes;

  ExpertCut sweep = cut(starts, args.num_experts, ceil_div(args.width, kPanel));
  s.tasks = sweep.tasks;
  run_tasks(sweep.count, gate_up_task<P, T>, &s);
  sweep = cut(starts, args.num_experts, ceil_div(args.hidden, kPanel));
  s.tasks = sweep.tasks;
  run_tasks(sweep.count, down_task<P, T>, &s);
  run_tasks(args.tokens, combine_task<T>, &s);
}

struct GroupedSweep {
  const GroupedArgs* args;
  const ExpertTask* tasks;
};

template <Path P, typename T>
static void grouped_task(const void* opaque, int64_t index) {
  using O = typename Operand<P>::type;
  const GroupedSweep& s = *static_cast<const GroupedSweep*>(opaque);
  const GroupedArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  int64_t pairs = ceil_div(a.k, 2), x_stride = operand_stride(a.k), first = t.panel * kPanel, c_stride = t.panels * kPanel;
  int64_t columns = min1(c_stride, a.n - first);
  O* x = static_cast<O*>(scratch(kSlotActivations, size_t(t.rows * x_stride) * sizeof(O)));
  for (int64_t r = 0; r < t.rows; ++r)
    operand_row(static_cast<const T*>(a.x.data) + (t.row + r) * a.x.stride, a.k, 1.0f, x + r * x_stride);
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 1) * c_stride) * sizeof(float)));
  float* bias = c + t.rows * c_stride;
  product<P>(x, x_stride, t.rows, expert_panel<P>(a.w, t.expert, pairs, t.panel), pairs, t.panels, c, c_stride);
  load_bias(a.w, t.expert, a.n, first, c_stride, bias);
  for (int64_t r = 0; r < t.rows; ++r)
    write_sums(c + r * c_stride, bias, columns, static_cast<T*>(a.out.data) + (t.row + r) * a.out.stride + first);
}

template <Path P, typename T>
static void grouped_path(const GroupedArgs& args) {
  int32_t* starts = static_cast<int32_t*>(scratch(kSlotExperts, size_t(args.num_experts + 1) * sizeof(int32_t)));
  starts[0] = 0;
  for (int64_t e = 0; e < args.num_experts; ++e)
    starts[e + 1] = int32_t(min1(args.rows, starts[e] + max1(int64_t(0), int64_t(args.sizes[e]))));
  ExpertCut sweep = cut(starts, args.num_experts, ceil_div(args.n, kPanel));
  GroupedSweep s{&args, sweep.tasks};
  run_tasks(sweep.count, grouped_task<P, T>, &s);
  for (int64_t row = starts[args.num_experts]; row < args.rows; ++row)
    __builtin_memset(static_cast<T*>(args.out.data) + row * args.out.stride, 0, size_t(args.n) * sizeof(T));
}

#ifndef HAS_DOT_BF16
static void experts(const ExpertsArgs& args) {
  bool x16 = args.x.dtype == DType::bf16;
  if (args.w13.dtype == DType::f32)
    x16 ? experts_path<Path::f32, uint16_t>(args) : experts_path<Path::f32, float>(args);
  else
    x16 ? experts_path<Path::bf16, uint16_t>(args) : experts_path<Path::bf16, float>(args);
}

static void grouped(const GroupedArgs& args) {
  bool x16 = args.x.dtype == DType::bf16;
  if (args.w.dtype == DType::f32)
    x16 ? grouped_path<Path::f32, uint16_t>(args) : grouped_path<Path::f32, float>(args);
  else
    x16 ? grouped_path<Path::bf16, uint16_t>(args) : grouped_path<Path::bf16, float>(args);
}
#endif
