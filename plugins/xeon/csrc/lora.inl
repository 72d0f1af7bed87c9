// lora.apply: tokens are sorted by adapter, so that each adapter in the batch is read once, and no other is. Two sweeps: shrink,
// h = scale A x, and expand, y + B h, both in float32. A token's sums run over its own adapter in a fixed order, whoever
// shares it. Tokens without an adapter cost the copy of their row.

constexpr int64_t kShrinkRows = 16;    // rows of A a task multiplies
constexpr int64_t kExpandPanels = 16;  // panels of 16 outputs a task expands to
constexpr int64_t kLoraTokens = 64;    // tokens a task covers

struct LoraTask {
  int64_t adapter;  // -1: rows to copy
  int64_t token, tokens;  // in sorted order
  int64_t part, first, count;  // rows of A; or outputs, of one part
};

struct LoraSweep {
  const LoraArgs* args;
  const LoraTask* tasks;
  const int32_t* order;  // sorted -> token
  float* h;              // sorted, [T, parts * rank]
};

// Tokens R rows of A: out[t][r] = a[r] . x[t], over pairs of vectors, whose sums meet in lane order at the end.
template <int Tokens, int R, typename T>
INLINE void dots(const T* const* x, const T* a, int64_t a_stride, int64_t width, float (*out)[R]) {
  vf sums[Tokens][R] = {};
  int64_t i = 0;
  if constexpr (sizeof(T) == 2) {
    for (; i + 2 * VL <= width; i += 2 * VL) {
      vf low[R], high[R];
      UNROLL for (int r = 0; r < R; ++r) {
        vu pair = load_bits(a + r * a_stride + i);
        low[r] = even(pair), high[r] = odd(pair);
      }
      UNROLL for (int t = 0; t < Tokens; ++t) {
        vu pair = load_bits(x[t] + i);
        UNROLL for (int r = 0; r < R; ++r) {
          accumulate(sums[t][r], low[r], even(pair));
          accumulate(sums[t][r], high[r], odd(pair));
        }
      }
    }
  } else {
    for (; i + VL <= width; i += VL) {
      UNROLL for (int t = 0; t < Tokens; ++t) {
        UNROLL for (int r = 0; r < R; ++r) accumulate(sums[t][r], load(a + r * a_stride + i), load(x[t] + i));
      }
    }
  }
  UNROLL for (int t = 0; t < Tokens; ++t) {
    UNROLL for (int r = 0; r < R; ++r) {
      float total = sum(sums[t][r]);
      for (int64_t j = i; j < width; ++j) total += load1(x[t] + j) * load1(a + r * a_stride + j);
      out[t][r] = total;
    }
  }
}

template <int R, typename T>
static void shrink_rows(const LoraSweep& s, const LoraTask& t, int64_t row) {
  const LoraArgs& a = *s.args;
  int64_t height = a.num_parts * a.rank;
  const T* rows = static_cast<const T*>(a.a) + (t.adapter * height + row) * a.in;
  for (int64_t token = t.token; token < t.token + t.tokens; token += 4) {
    int64_t some = min1(4, t.token + t.tokens - token);
    const T* x[4];
    float h[4][R];
    for (int64_t i = 0; i < 4; ++i)
      x[i] = static_cast<const T*>(a.x.data) + s.order[token + min1(i, some - 1)] * a.x.stride;
    if (some > 2)
      dots<4, R>(x, rows, a.in, a.in, h);
    else if (some == 2)
      dots<2, R>(x, rows, a.in, a.in, h);
    else
      dots<1, R>(x, rows, a.in, a.in, h);
    for (int64_t i = 0; i < some; ++i)
      for (int r = 0; r < R; ++r) s.h[(token + i) * height + row + r] = h[i][r] * a.scale[t.adapter * a.num_parts + (row + r) / a.rank];
  }
}

template <typename T>
static void shrink_task(const void* opaque, int64_t index) {
  const LoraSweep& s = *static_cast<const LoraSweep*>(opaque);
  const LoraTask& t = s.tasks[index];
  int64_t row = t.first, end = t.first + t.count;
  for (; row + 2 <= end; row += 2) shrink_rows<2, T>(s, t, row);
  if (row < end) shrink_rows<1, T>(s, t, row);
}

// b: `rows` <= 16 rows of `rank` elements -> out: [rank][16] floats, zeros beside the rows.
template <typename T>
static void transpose_rows(const T* b, int64_t rank, int64_t rows, float* out) {
  for (int64_t j = rows; j < kPanel; ++j)
    for (int64_t r = 0; r < rank; ++r) out[r * kPanel + j] = 0.0f;
  int64_t done = 0;
  if constexpr (sizeof(T) == 2) {
    // 8 x 8 words of two elements: three exchanges of halves, quarters and eighths.
    typedef uint32_t v8 __attribute__((vector_size(32), may_alias, aligned(2)));
    for (; done + 16 <= rank && rows == kPanel; done += 16) {
      for (int64_t j = 0; j < kPanel; j += 8) {
        v8 m[8], n[8];
        UNROLL for (int i = 0; i < 8; ++i) m[i] = *reinterpret_cast<const v8*>(b + (j + i) * rank + done);
        UNROLL for (int i = 0; i < 4; ++i) {
          n[i] = __builtin_shuffle(m[i], m[i + 4], (v8){0, 1, 2, 3, 8, 9, 10, 11});
          n[i + 4] = __builtin_shuffle(m[i], m[i + 4], (v8){4, 5, 6, 7, 12, 13, 14, 15});
        }
        UNROLL for (int i = 0; i < 8; i += 4) {
          UNROLL for (int k = 0; k < 2; ++k) {
            m[i + k] = __builtin_shuffle(n[i + k], n[i + k + 2], (v8){0, 1, 8, 9, 4, 5, 12, 13});
            m[i + k + 2] = __builtin_shuffle(n[i + k], n[i + k + 2], (v8){2, 3, 10, 11, 6, 7, 14, 15});
          }
        }
        UNROLL for (int i = 0; i < 8; i += 2) {
          v8 words[2] = {
              __builtin_shuffle(m[i], m[i + 1], (v8){0, 8, 2, 10, 4, 12, 6, 14}),
              __builtin_shuffle(m[i], m[i + 1], (v8){1, 9, 3, 11, 5, 13, 7, 15})};
          UNROLL for (int k = 0; k < 2; ++k) {
            float* to = out + (done + (i + k) * 2) * kPanel + j;
            *reinterpret_cast<v8*>(to) = words[k] << 16;
            *reinterpret_cast<v8*>(to + kPanel) = words[k] & 0xffff0000u;
          }
        }
      }
    }
  }
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t r = done; r < rank; ++r) out[r * kPanel + j] = load1(b + j * rank + r);
}

// out = y + the sum over r of h[r] * b[r], of `count` <= 16 outputs of some tokens, which share the loads of b.
template <int Tokens, typename Y>
INLINE void expand_rows(const float* b, const float* const* h, int64_t rank, const Y* const* y, Y* const* out, int64_t count) {
  vf sums[Tokens][kVecs] = {};
  for (int64_t r = 0; r < rank; ++r) {
    vf row[kVecs];
    UNROLL for (int v = 0; v < kVecs; ++v) row[v] = load(b + r * kPanel + v * VL);
    UNROLL for (int t = 0; t < Tokens; ++t) {
      UNROLL for (int v = 0; v < kVecs; ++v) accumulate(sums[t][v], row[v], splat(h[t][r]));
    }
  }
  UNROLL for (int t = 0; t < Tokens; ++t) {
    if (count == kPanel) {
      UNROLL for (int v = 0; v < kVecs; ++v) store(out[t] + v * VL, load(y[t] + v * VL) + sums[t][v]);
    } else {
      float row[kPanel];
      UNROLL for (int v = 0; v < kVecs; ++v) store(row + v * VL, sums[t][v]);
      for (int64_t j = 0; j < count; ++j) store1(out[t] + j, load1(y[t] + j) + row[j]);
    }
  }
}

template <typename T, typename Y>
static void expand_task(const void* opaque, int64_t index) {
  const LoraSweep& s = *static_cast<const LoraSweep*>(opaque);
  const LoraTask& t = s.tasks[index];
  const LoraArgs& a = *s.args;
  const Y* y = static_cast<const Y*>(a.y.data);
  Y* out = static_cast<Y*>(a.out.data);
  if (t.adapter < 0) {
    for (int64_t i = t.token; i < t.token + t.tokens; ++i)
      __builtin_memcpy(out + s.order[i] * a.out.stride, y + s.order[i] * a.y.stride, size_t(a.width) * sizeof(Y));
    return;
  }
  float* b = static_cast<float*>(scratch(kSlotTile, size_t(a.rank * kPanel) * sizeof(float)));
  for (int64_t first = t.first; first < t.first + t.count; first += kPanel) {
    int64_t count = min1(kPanel, t.first + t.count - first);
    transpose_rows(static_cast<const T*>(a.b) + (t.adapter * a.width + first) * a.rank, a.rank, count, b);
    for (int64_t i = t.token; i < t.token + t.tokens; i += 4) {
      int64_t some = min1(4, t.token + t.tokens - i);
      const float* h[4];
      const Y* from[4];
      Y* to[4];
      for (int64_t k = 0; k < some; ++k) {
        int64_t token = s.order[i + k];
        h[k] = s.h + ((i + k) * a.num_parts + t.part) * a.rank;
        from[k] = y + token * a.y.stride + first, to[k] = out + token * a.out.stride + first;
      }
      if (some == 4) {
        expand_rows<4>(b, h, a.rank, from, to, count);
        continue;
      }
      if (some >= 2) expand_rows<2>(b, h, a.rank, from, to, count);
      if (some % 2) expand_rows<1>(b, h + some - 1, a.rank, from + some - 1, to + some - 1, count);
    }
  }
}

// 0: none.
INLINE int64_t lora_group(const LoraArgs& a, int64_t token) {
  int64_t adapter = a.token_adapter[token];
  return adapter >= 0 && adapter < a.adapters ? adapter + 1 : 0;
}

template <typename T>
static void lora_of(const LoraArgs& a) {
  // Sorted by counting; what names no adapter comes first.
  int32_t* starts = static_cast<int32_t*>(scratch(kSlotExperts, size_t(a.adapters + 3 + a.tokens) * sizeof(int32_t)));
  int32_t* order = starts + a.adapters + 3;
  for (int64_t g = 0; g < a.adapters + 3; ++g) starts[g] = 0;
  for (int64_t t = 0; t < a.tokens; ++t) ++starts[lora_group(a, t) + 2];
  for (int64_t g = 2; g < a.adapters + 3; ++g) starts[g] += starts[g - 1];
  for (int64_t t = 0; t < a.tokens; ++t) order[starts[lora_group(a, t) + 1]++] = int32_t(t);

  int64_t height = a.num_parts * a.rank, blocks = 0, panels = a.num_parts;  // a part's last block may be short
  for (int64_t g = 0; g <= a.adapters; ++g) blocks += ceil_div(starts[g + 1] - starts[g], kLoraTokens);
  panels += ceil_div(a.width, kExpandPanels * kPanel);
  int64_t most = blocks * max1(panels, ceil_div(height, kShrinkRows));
  LoraTask* tasks = static_cast<LoraTask*>(scratch(kSlotPlan, size_t(most) * sizeof(LoraTask)));
  LoraSweep s{&a, tasks, order, static_cast<float*>(scratch(kSlotHidden, size_t(a.tokens * height) * sizeof(float)))};
  int64_t count = 0;
  for (int64_t g = 1; g <= a.adapters; ++g)
    for (int64_t row = 0; row < height; row += kShrinkRows)
      for (int64_t t = starts[g]; t < starts[g + 1]; t += kLoraTokens)
        tasks[count++] = {g - 1, t, min1(kLoraTokens, starts[g + 1] - t), 0, row, min1(kShrinkRows, height - row)};
  run_tasks(count, shrink_task<T>, &s);

  count = 0;
  for (int64_t t = starts[0]; t < starts[1]; t += kLoraTokens)
    tasks[count++] = {-1, t, min1(kLoraTokens, starts[1] - t), 0, 0, 0};
  for (int64_t g = 1; g <= a.adapters; ++g)
    for (int64_t part = 0, row = 0; part < a.num_parts; row += a.parts[part++])
      for (int64_t first = 0; first < a.parts[part]; first += kExpandPanels * kPanel)
        for (int64_t t = starts[g]; t < starts[g + 1]; t += kLoraTokens) {
          int64_t columns = min1(kExpandPanels * kPanel, a.parts[part] - first);
          tasks[count++] = {g - 1, t, min1(kLoraTokens, starts[g + 1] - t), part, row + first, columns};
        }
  run_tasks(count, a.y.dtype == DType::f32 ? expand_task<T, float> : expand_task<T, uint16_t>, &s);
}

static void lora(const LoraArgs& args) {
  if (args.dtype == DType::bf16)
    lora_of<uint16_t>(args);
  else
    lora_of<float>(args);
}
