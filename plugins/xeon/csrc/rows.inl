// Ops that map rows to rows: norms, gated activation, rope, argmax, embedding. Each reads its input once.

constexpr int64_t kSerialElements = 16384;  // less work than this is done sooner than a second thread is woken

// Runs the rows in tasks of about kSerialElements elements each.
struct RowRange {
  const void* args;
  int64_t rows, per_task;
};

template <void (*One)(const void*, int64_t)>
static void some_rows(const void* opaque, int64_t index) {
  const RowRange& range = *static_cast<const RowRange*>(opaque);
  int64_t end = min1(range.rows, (index + 1) * range.per_task);
  for (int64_t row = index * range.per_task; row < end; ++row) One(range.args, row);
}

template <void (*One)(const void*, int64_t)>
static void each_row(const void* args, int64_t rows, int64_t width) {
  RowRange range{args, rows, max1(int64_t(1), kSerialElements / max1(int64_t(1), width))};
  run_tasks(ceil_div(rows, range.per_task), some_rows<One>, &range);
}

INLINE vf load_as(const void* p, DType dtype, int64_t i) {
  return dtype == DType::f32 ? load(static_cast<const float*>(p) + i) : load(static_cast<const uint16_t*>(p) + i);
}

template <typename T>
INLINE void rms_of(const T* x, const void* weight, DType weight_dtype, int64_t width, float eps, T* out) {
  vf squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * VL <= width; i += 2 * VL) {
    vf first = load(x + i), second = load(x + i + VL);
    squares[0] += first * first;
    squares[1] += second * second;
  }
  float total = sum(squares[0] + squares[1]);
  for (; i < width; ++i) total += load1(x + i) * load1(x + i);
  float scale = 1.0f / __builtin_sqrtf(total / float(width) + eps);
  for (i = 0; i + VL <= width; i += VL) store(out + i, load(x + i) * scale * load_as(weight, weight_dtype, i));
  for (; i < width; ++i) store1(out + i, load1(x + i) * scale * load1(weight, weight_dtype, i));
}

template <typename T>
static void norm_row(const void* opaque, int64_t index) {
  const NormArgs& a = *static_cast<const NormArgs*>(opaque);
  const T* x = static_cast<const T*>(a.x.data) + index / a.inner * a.x.stride + index % a.inner * a.inner_stride;
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out) + index * a.width;
  if (residual) {  // the norm is of the rounded sum
    residual += index * a.width;
    T* total = static_cast<T*>(a.residual_out) + index * a.width;
    int64_t i = 0;
    for (; i + VL <= a.width; i += VL) store(total + i, load(x + i) + load(residual + i));
    for (; i < a.width; ++i) store1(total + i, load1(x + i) + load1(residual + i));
    x = total;
  }
  rms_of(x, a.weight, a.weight_dtype, a.width, a.eps, out);
  if (!a.gate.data) return;
  const T* opens =
      static_cast<const T*>(a.gate.data) + index / a.inner * a.gate.stride + index % a.inner * a.gate_inner_stride;
  int64_t i = 0;
  for (; i + VL <= a.width; i += VL) store(out + i, load(out + i) * silu(load(opens + i)));
  if (i == a.width) return;
  vf rest{};
  for (int64_t j = 0; i + j < a.width; ++j) rest[j] = load1(opens + i + j);
  rest = silu(rest);
  for (int64_t j = 0; i + j < a.width; ++j) store1(out + i + j, load1(out + i + j) * rest[j]);
}

static void norm(const NormArgs& args) {
  int64_t cost = args.gate.data ? args.width * 8 : args.width;  // as in `gated`, below
  if (args.x.dtype == DType::bf16)
    each_row<norm_row<uint16_t>>(&args, args.rows * args.inner, cost);
  else
    each_row<norm_row<float>>(&args, args.rows * args.inner, cost);
}

template <typename T>
static void gated_row(const void* opaque, int64_t row) {
  const GatedArgs& a = *static_cast<const GatedArgs*>(opaque);
  const T* x = static_cast<const T*>(a.x.data) + row * a.x.stride;
  T* out = static_cast<T*>(a.out) + row * a.width;
  int64_t i = 0;
  for (; i + VL <= a.width; i += VL) store(out + i, gate(load(x + i), a.gate) * load(x + a.width + i));
  if (i == a.width) return;
  vf rest{}, up{};
  for (int64_t j = 0; i + j < a.width; ++j) rest[j] = load1(x + i + j), up[j] = load1(x + a.width + i + j);
  rest = gate(rest, a.gate) * up;
  for (int64_t j = 0; i + j < a.width; ++j) store1(out + i + j, rest[j]);
}

static void gated(const GatedArgs& args) {
  // An exponential costs about as much as eight plain elements.
  if (args.x.dtype == DType::bf16)
    each_row<gated_row<uint16_t>>(&args, args.rows, args.width * 8);
  else
    each_row<gated_row<float>>(&args, args.rows, args.width * 8);
}

// One head; `cosine`: rotary / 2 cosines, then as many sines. x may be out.
template <typename T>
INLINE void turn(const T* x, const float* cosine, int64_t rotary, int64_t head_dim, bool interleaved, T* out) {
  int64_t half = rotary / 2, i = 0;
  const float* sine = cosine + half;
  if (!interleaved) {
    for (; i + VL <= half; i += VL) {
      vf first = load(x + i), second = load(x + half + i), c = load(cosine + i), s = load(sine + i);
      store(out + i, first * c - second * s);
      store(out + half + i, second * c + first * s);
    }
  }
  for (; i < half; ++i) {
    int64_t j = interleaved ? 2 * i : i, k = interleaved ? 2 * i + 1 : half + i;
    float first = load1(x + j), second = load1(x + k);
    store1(out + j, first * cosine[i] - second * sine[i]);
    store1(out + k, second * cosine[i] + first * sine[i]);
  }
  if (out != x)
    for (i = rotary; i < head_dim; ++i) out[i] = x[i];
}

template <typename T>
static void rope_token(const void* opaque, int64_t token) {
  const RopeArgs& a = *static_cast<const RopeArgs*>(opaque);
  const float* cosine = a.cos_sin + int64_t(a.positions[token]) * a.rotary;
  const T* x = static_cast<const T*>(a.x.data) + token * a.x.stride;
  T* out = static_cast<T*>(a.out.data) + token * a.out.stride;
  for (int64_t head = 0; head < a.heads; ++head, x += a.head_dim, out += a.head_dim)
    turn(x, cosine, a.rotary, a.head_dim, a.interleaved, out);
}

static void rope(const RopeArgs& args) {
  if (args.x.dtype == DType::bf16)
    each_row<rope_token<uint16_t>>(&args, args.tokens, args.heads * args.head_dim);
  else
    each_row<rope_token<float>>(&args, args.tokens, args.heads * args.head_dim);
}

// The lowest index among equals; a NaN counts as the largest, as torch has it.
template <typename T>
static void argmax_row(const void* opaque, int64_t row) {
  const ArgmaxArgs& a = *static_cast<const ArgmaxArgs*>(opaque);
  const T* x = static_cast<const T*>(a.x.data) + row * a.x.stride;
  constexpr int64_t block = 1024;
  float best = 0;
  int64_t at = -1;
  for (int64_t first = 0; first < a.width; first += block) {
    int64_t end = min1(a.width, first + block), i = first;
    vf top = splat(-__builtin_inff());
    vi nan{};
    for (; i + VL <= end; i += VL) {
      vf values = load(x + i);
      top = max(top, values);
      nan |= values != values;
    }
    float most = max_lane(top);
    bool any_nan = false;
    UNROLL for (int j = 0; j < VL; ++j) any_nan |= nan[j] != 0;
    for (; i < end; ++i) {
      float value = load1(x + i);
      most = max1(most, value);
      any_nan |= value != value;
    }
    if (!any_nan && at >= 0 && most <= best) continue;
    for (i = first; i < end; ++i) {  // this block holds the best so far: find it
      float value = load1(x + i);
      if (value != value) {
        a.out[row] = int32_t(i);
        return;
      }
      if (at < 0 || value > best) best = value, at = i;
    }
  }
  a.out[row] = int32_t(at);
}

static void argmax(const ArgmaxArgs& args) {
  if (args.x.dtype == DType::bf16)
    each_row<argmax_row<uint16_t>>(&args, args.rows, args.width);
  else
    each_row<argmax_row<float>>(&args, args.rows, args.width);
}

template <typename T>
static void layer_norm_row(const void* opaque, int64_t row) {
  const LayerNormArgs& a = *static_cast<const LayerNormArgs*>(opaque);
  const T* x = static_cast<const T*>(a.x.data) + row * a.x.stride;
  T* out = static_cast<T*>(a.out) + row * a.width;
  int64_t whole = a.width / VL * VL;
  vf sums{}, squares{};
  for (int64_t i = 0; i < whole; i += VL) sums += load(x + i);
  float total = sum(sums), square = 0;
  for (int64_t i = whole; i < a.width; ++i) total += load1(x + i);
  float mean = total / float(a.width);
  for (int64_t i = 0; i < whole; i += VL) {
    vf y = load(x + i) - mean;
    squares += y * y;
  }
  for (int64_t i = whole; i < a.width; ++i) square += (load1(x + i) - mean) * (load1(x + i) - mean);
  float scale = 1.0f / __builtin_sqrtf((sum(squares) + square) / float(a.width) + a.eps);
  for (int64_t i = 0; i < whole; i += VL) {
    vf y = (load(x + i) - mean) * scale * load_as(a.weight, a.weight_dtype, i);
    store(out + i, a.bias ? y + load_as(a.bias, a.bias_dtype, i) : y);
  }
  for (int64_t i = whole; i < a.width; ++i) {
    float y = (load1(x + i) - mean) * scale * load1(a.weight, a.weight_dtype, i);
    store1(out + i, a.bias ? y + load1(a.bias, a.bias_dtype, i) : y);
  }
}

static void layer_norm(const LayerNormArgs& args) {
  if (args.x.dtype == DType::bf16)
    each_row<layer_norm_row<uint16_t>>(&args, args.rows, args.width);
  else
    each_row<layer_norm_row<float>>(&args, args.rows, args.width);
}

static void embed_row(const void* opaque, int64_t token) {
  const EmbedArgs& a = *static_cast<const EmbedArgs*>(opaque);
  int64_t row = int64_t(a.ids[token]) - a.first_id;
  if (row >= 0 && row < a.num_ids)
    __builtin_memcpy(a.out + token * a.row_bytes, a.table + row * a.row_bytes, size_t(a.row_bytes));
  else
    __builtin_memset(a.out + token * a.row_bytes, 0, size_t(a.row_bytes));
}

static void embed(const EmbedArgs& args) { each_row<embed_row>(&args, args.tokens, args.row_bytes / 2); }
