// moe.fused and gemm.grouped: products with a stack of experts, by `multiply` of multiply.inl, so in every weight format.
//
// Rows are sorted by expert, and the work is cut into (expert, block of rows, block of columns): each expert that has rows is
// read once, by whichever threads are free, and none that has not. moe.fused runs in sweeps: activations prepared, gate and up
// and the activation function, its results prepared, down, and the weighted sum of each token's results in the order of its
// choices. A token is prepared once and gathered by the tasks of its experts. A row's result depends on that row
// alone, but where AMX tiles are allowed: they sum in another order where an expert has rows enough.

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
static ExpertCut cut(const Weight& w, const int32_t* starts, int64_t experts, int64_t panels) {
  int64_t blocks = 0, height = row_block(w);
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

// x rounded to T.
template <typename T>
INLINE vf rounded(vf x) {
  if constexpr (sizeof(T) == 2) return (vf)(round_bf16(x) << 16);
  return x;
}

struct ExpertSweeps {
  const ExpertsArgs* args;
  const ExpertTask* tasks;
  const int32_t* starts;  // [experts + 1]
  const int32_t* order;   // sorted row -> token * top_k + choice
  bool by_choice;         // x is prepared for each sorted row, not for each token
  Activations x;
  void* h;  // [sorted rows, h_stride], x's dtype
  int64_t h_stride;
  Activations prepared_h;
  void* y;           // [T * top_k, y_stride], x's dtype, as the choices are
  int64_t y_stride;  // whole panels
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

// Whose row a sorted row is: the last expert that starts at or before it and has rows.
INLINE int64_t expert_of_row(const ExpertSweeps& s, int64_t row) {
  int64_t low = 0, high = s.args->num_experts;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (s.starts[middle] <= row ? low : high) = middle;
  }
  return low;
}

INLINE const float* x_scale_of(const ExpertSweeps& s, const ExpertStack& stack, int64_t row) {
  return stack.x_scale ? stack.x_scale + expert_of_row(s, row) : nullptr;
}

// A token, or one of a token's rows: then with its expert's scale, and multiplied by its weight where that comes first.
template <typename T>
static void prepare_x(const void* opaque, int64_t index) {
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  if (!s.by_choice) return prepare_row(a.x, index, a.w13.first, a.w13.quantize, nullptr, s.x, index);
  int64_t choice = s.order[index], token = choice / a.top_k;
  const float* scale = x_scale_of(s, a.w13, index);
  if (!a.weight_on_input) return prepare_row(a.x, token, a.w13.first, a.w13.quantize, scale, s.x, index);
  int64_t padded = ceil_div(a.hidden, kPanel) * kPanel;
  T* row = static_cast<T*>(scratch(kSlotTile, size_t(padded) * sizeof(T)));
  __builtin_memcpy(row, static_cast<const T*>(a.x.data) + token * a.x.stride, size_t(a.hidden) * sizeof(T));
  for (int64_t i = 0; i < padded; i += VL) store(row + i, load(row + i) * a.weights[choice]);
  prepare_row({row, a.x.dtype, padded}, 0, a.w13.first, a.w13.quantize, scale, s.x, index);
}

static void prepare_h(const void* opaque, int64_t index) {
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  Rows h{s.h, a.x.dtype, s.h_stride};
  prepare_row(h, index, a.w2.first, a.w2.quantize, x_scale_of(s, a.w2, index), s.prepared_h, index);
}

template <typename T>
static void gate_up_task(const void* opaque, int64_t index) {
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  Weight w = expert_of(a.w13, t.expert);
  Activations x = s.x;
  int64_t row = t.row;
  if (!s.by_choice && t.rows == 1) {
    row = s.order[t.row] / a.top_k;
  } else if (!s.by_choice) {
    int64_t bytes = lay_out(w, a.w13.quantize, t.rows, nullptr, x);
    lay_out(w, a.w13.quantize, t.rows, scratch(kSlotActivations, size_t(bytes)), x);
    for (int64_t r = 0; r < t.rows; ++r) copy_prepared(w, s.x, s.order[t.row + r] / a.top_k, x, r);
    row = 0;
  }
  // A step's worth of gate columns at a time, and the panels that hold the up columns beside them.
  int64_t step = panels_per_step(w, t.rows), c_stride = (2 * step + 1) * kPanel;
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 2) * c_stride) * sizeof(float)));
  float *gate_bias = c + t.rows * c_stride, *up_bias = gate_bias + c_stride;
  for (int64_t p = t.panel; p < t.panel + t.panels; p += step) {
    int64_t count = min1(step, t.panel + t.panels - p), width = count * kPanel, first = p * kPanel;
    int64_t up = a.width + first, shift = up % kPanel, columns = min1(width, a.width - first);
    multiply(w, x, row, t.rows, p, count, c, c_stride, a.tiles);
    multiply(w, x, row, t.rows, up / kPanel, ceil_div(shift + columns, kPanel), c + width, c_stride, a.tiles);
    load_bias(a.w13, t.expert, first, width, gate_bias);
    load_bias(a.w13, t.expert, up, width, up_bias);
    for (int64_t r = 0; r < t.rows; ++r) {
      const float *gates = c + r * c_stride, *ups = gates + width + shift;
      T* h = static_cast<T*>(s.h) + (t.row + r) * s.h_stride + first;
      for (int64_t j = 0; j < width; j += VL) {
        vf g = rounded<T>(load(gates + j) + load(gate_bias + j)), u = rounded<T>(load(ups + j) + load(up_bias + j));
        store(h + j, activated(a, g, u));
      }
    }
  }
}

template <typename T>
static void down_task(const void* opaque, int64_t index) {
  const ExpertSweeps& s = *static_cast<const ExpertSweeps*>(opaque);
  const ExpertsArgs& a = *s.args;
  const ExpertTask& t = s.tasks[index];
  int64_t first = t.panel * kPanel, c_stride = t.panels * kPanel, columns = min1(c_stride, a.hidden - first);
  float* c = static_cast<float*>(scratch(kSlotTile, size_t((t.rows + 1) * c_stride) * sizeof(float)));
  float* bias = c + t.rows * c_stride;
  multiply(expert_of(a.w2, t.expert), s.prepared_h, t.row, t.rows, t.panel, t.panels, c, c_stride, a.tiles);
  load_bias(a.w2, t.expert, first, c_stride, bias);
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

// A few rows are prepared sooner than a second thread is woken.
static void prepare_rows(int64_t rows, Task prepare, const void* args) {
  if (rows > 8) return run_tasks(rows, prepare, args);
  for (int64_t row = 0; row < rows; ++row) prepare(args, row);
}

template <typename T>
static void experts_of(const ExpertsArgs& args) {
  int64_t choices = args.tokens * args.top_k, experts = args.num_experts;
  // Sorted by counting: starts[e + 1] counts, then says where expert e goes on, and at last where it ends.
  int32_t* starts = static_cast<int32_t*>(scratch(kSlotExperts, size_t(experts + 2 + choices) * sizeof(int32_t)));
  int32_t* order = starts + experts + 2;
  for (int64_t e = 0; e < experts + 2; ++e) starts[e] = 0;
  for (int64_t i = 0; i < choices; ++i)
    if (int64_t e = local_expert(args, i); e >= 0) ++starts[e + 2];
  for (int64_t e = 2; e < experts + 2; ++e) starts[e] += starts[e - 1];
  for (int64_t i = 0; i < choices; ++i)
    if (int64_t e = local_expert(args, i); e >= 0) order[starts[e + 1]++] = int32_t(i);

  ExpertSweeps s{};
  s.args = &args, s.starts = starts, s.order = order;
  s.by_choice = args.weight_on_input || args.w13.x_scale;
  int64_t rows = starts[experts], x_rows = s.by_choice ? rows : args.tokens;
  s.h_stride = ceil_div(args.width, kPanel) * kPanel + kPanel, s.y_stride = ceil_div(args.hidden, kPanel) * kPanel;
  int64_t x_bytes = ceil_div(lay_out(args.w13.first, args.w13.quantize, x_rows, nullptr, s.x), 64) * 64;
  int64_t g_bytes = ceil_div(lay_out(args.w2.first, args.w2.quantize, rows, nullptr, s.prepared_h), 64) * 64;
  int64_t h_bytes = ceil_div(rows * s.h_stride * int64_t(sizeof(T)), 64) * 64, y_bytes = choices * s.y_stride * int64_t(sizeof(T));
  char* memory = static_cast<char*>(scratch(kSlotHidden, size_t(x_bytes + g_bytes + h_bytes + y_bytes)));
  lay_out(args.w13.first, args.w13.quantize, x_rows, memory, s.x);
  lay_out(args.w2.first, args.w2.quantize, rows, memory + x_bytes, s.prepared_h);
  s.h = memory + x_bytes + g_bytes, s.y = memory + x_bytes + g_bytes + h_bytes;

  prepare_rows(x_rows, prepare_x<T>, &s);
  ExpertCut sweep = cut(args.w13.first, starts, experts, ceil_div(args.width, kPanel));
  s.tasks = sweep.tasks;
  run_tasks(sweep.count, gate_up_task<T>, &s);
  prepare_rows(rows, prepare_h, &s);
  sweep = cut(args.w2.first, starts, experts, ceil_div(args.hidden, kPanel));
  s.tasks = sweep.tasks;
  run_tasks(sweep.count, down_task<T>, &s);
  run_tasks(args.tokens, combine_task<T>, &s);
}

static void experts(const ExpertsArgs& args) {
  if (args.x.dtype == DType::bf16)
    experts_of<uint16_t>(args);
  else
    experts_of<float>(args);
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
  ExpertCut sweep = cut(args.w.first, starts, args.num_experts, ceil_div(args.w.first.n, kPanel));
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
