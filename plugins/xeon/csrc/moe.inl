// moe.fused, on the cut and the stacks of grouped.inl. It runs in sweeps: activations prepared, gate and up and the activation
// function, its results prepared, down, and the weighted sum of each token's results in the order of its choices. A token is
// prepared once and gathered by the tasks of its experts. A row's result depends on that row alone, but where AMX tiles are
// allowed: they sum in another order where an expert has rows enough.

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
  ExpertCut sweep = cut(args.w13.first, args.tiles, starts, experts, ceil_div(args.width, kPanel));
  s.tasks = sweep.tasks;
  run_tasks(sweep.count, gate_up_task<T>, &s);
  prepare_rows(rows, prepare_h, &s);
  sweep = cut(args.w2.first, args.tiles, starts, experts, ceil_div(args.hidden, kPanel));
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
