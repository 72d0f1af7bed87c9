// gemm.grouped, and what it shares with moe.fused: products with a stack of weights, one an expert, by `multiply` of multiply.inl, so in
// every format. Rows are sorted by expert, and the work is cut into (expert, block of rows, block of columns): each expert that
// has rows is read once, by whichever threads are free, and none that has not.

constexpr int64_t kExpertPanels = 8;  // most panels of a task, unless a step takes more: a long stream of weights

struct ExpertTask {
  int64_t expert, row, rows;  // rows in sorted order
  int64_t panel, panels;
};

struct ExpertCut {
  const ExpertTask* tasks;
  int64_t count;
};

// starts: [experts + 1], the first sorted row of each.
static ExpertCut cut(const Weight& w, const TileKernels* tiles, const int32_t* starts, int64_t experts, int64_t panels) {
  int64_t blocks = 0, height = row_block(w, tiles);
  for (int64_t e = 0; e < experts; ++e) blocks += ceil_div(starts[e + 1] - starts[e], height);
  // Enough tasks that a slow thread holds the others up by little.
  int64_t wanted = max1(int64_t(1), min1(kExpertPanels, blocks * panels / (12 * num_threads())));
  ExpertTask* tasks =
      static_cast<ExpertTask*>(scratch(kSlotPlan, size_t(blocks * ceil_div(panels, wanted)) * sizeof(ExpertTask)));
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t size = starts[e + 1] - starts[e];
    if (size == 0) continue;
    int64_t step = panels_per_step(w, min1(size, height)), width = ceil_div(wanted, step) * step;
    // Row blocks of one group of panels follow each other: its weights come from cache for all but the first.
    for (int64_t panel = 0; panel < panels; panel += width)
      for (int64_t row = 0; row < size; row += height)
        tasks[count++] = {e, starts[e] + row, min1(height, size - row), panel, min1(width, panels - panel)};
  }
  return {tasks, count};
}

// The weight of one expert. Its columns are never reordered by expert: weights.py refuses such stacks.
INLINE Weight expert_of(const ExpertStack& stack, int64_t expert) {
  Weight w = stack.first;
  int64_t panels = ceil_div(w.n, kPanel), by_group = expert * panels * w.groups * kPanel, column = expert * panels * kPanel;
  w.codes = static_cast<const char*>(w.codes) + expert * panels * panel_bytes(w);
  if (w.scales) w.scales = static_cast<const char*>(w.scales) + by_group * scale_bytes(w.scale_type);
  if (w.zeros) w.zeros += by_group;
  if (w.column_scale) w.column_scale += column;
  if (w.column_sum) w.column_sum += column;
  if (w.tables) w.tables += expert * panels * kCodes, w.starts += expert * panels;
  return w;
}

// Row `from` of prepared rows into row `to` of others, which were laid out alike.
static void copy_prepared(const Weight& w, const Activations& rows, int64_t from, const Activations& out, int64_t to) {
  int64_t bytes = rows.stride * (w.element == Element::int8 ? int64_t(sizeof(ActInt8)) : int64_t(sizeof(Act)));
  char* at = static_cast<char*>(const_cast<void*>(out.data));
  __builtin_memcpy(at + to * bytes, static_cast<const char*>(rows.data) + from * bytes, size_t(bytes));
  if (rows.row_scale) const_cast<float*>(out.row_scale)[to] = rows.row_scale[from];
  if (rows.row_zero) const_cast<int32_t*>(out.row_zero)[to] = rows.row_zero[from];
  if (rows.group_scale)
    __builtin_memcpy(
        const_cast<float*>(out.group_scale) + to * w.groups, rows.group_scale + from * w.groups, size_t(w.groups) * sizeof(float));
}

// bias[first, first + count) of one expert, zeros where there is none.
static void load_bias(const ExpertStack& stack, int64_t expert, int64_t first, int64_t count, float* bias) {
  int64_t n = stack.first.n;
  for (int64_t j = 0; j < count; ++j)
    bias[j] = stack.bias && first + j < n ? load1(stack.bias, stack.bias_dtype, expert * n + first + j) : 0.0f;
}

// out[j] = c[j] + bias[j], of `count` columns; c and bias are whole panels. c is changed.
template <typename T>
static void write_sums(float* c, const float* bias, int64_t count, T* out) {
  for (int64_t j = 0; j < count; j += kPanel) {
    UNROLL for (int v = 0; v < kVecs; ++v) store(c + j + v * VL, load(c + j + v * VL) + load(bias + j + v * VL));
    write_columns(c + j, min1(kPanel, count - j), out + j);
  }
}

struct GroupedSweep {
  const GroupedArgs* args;
  const ExpertTask* tasks;
};

template <typename T>
static void grouped_task(const void* opaque, int64_t index) {
  const GroupedSweep& s = *static_cast<const GroupedSweep*>(opaque);
  const GroupedArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  Weight w = expert_of(a.w, t.expert);
  Activations x;
  int64_t bytes = lay_out(w, a.w.quantize, t.rows, nullptr, x);
  lay_out(w, a.w.quantize, t.rows, scratch(kSlotActivations, size_t(bytes)), x);
  const float* x_scale = a.w.x_scale ? a.w.x_scale + t.expert : nullptr;
  for (int64_t r = 0; r < t.rows; ++r) prepare_row(a.x, t.row + r, w, a.w.quantize, x_scale, x, r);
  int64_t first = t.panel * kPanel, c_stride = t.panels * kPanel, columns = min1(c_stride, w.n - first);
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 1) * c_stride) * sizeof(float)));
  float* bias = c + t.rows * c_stride;
  multiply(w, x, 0, t.rows, t.panel, t.panels, c, c_stride, a.tiles);
  load_bias(a.w, t.expert, first, c_stride, bias);
  for (int64_t r = 0; r < t.rows; ++r)
    write_sums(c + r * c_stride, bias, columns, static_cast<T*>(a.out.data) + (t.row + r) * a.out.stride + first);
}

template <typename T>
static void grouped_of(const GroupedArgs& args) {
  int32_t* starts = static_cast<int32_t*>(scratch(kSlotExperts, size_t(args.num_experts + 1) * sizeof(int32_t)));
  starts[0] = 0;
  for (int64_t e = 0; e < args.num_experts; ++e)
    starts[e + 1] = int32_t(min1(args.rows, starts[e] + max1(int64_t(0), int64_t(args.sizes[e]))));
  ExpertCut sweep = cut(args.w.first, args.tiles, starts, args.num_experts, ceil_div(args.w.first.n, kPanel));
  GroupedSweep s{&args, sweep.tasks};
  run_tasks(sweep.count, grouped_task<T>, &s);
  for (int64_t row = starts[args.num_experts]; row < args.rows; ++row)
    __builtin_memset(static_cast<T*>(args.out.data) + row * args.out.stride, 0, size_t(args.w.first.n) * sizeof(T));
}

static void grouped(const GroupedArgs& args) {
  if (args.x.dtype == DType::bf16)
    grouped_of<uint16_t>(args);
  else
    grouped_of<float>(args);
}
