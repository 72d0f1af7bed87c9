// attn.paged after the write: every new token over its req's pages. Work is cut by (req, tile of queries, KV heads, part of the
// keys). The rows of a tile are its queries times the heads that share a KV head, so each key is read once for all of them.
// Softmax is online in float32. Two ways to visit a block of keys:
//   direct  few rows (decode): dot products straight from the cache, all KV heads of a block before the next block, so that
//           pages are read from end to end;
//   tiled   many rows (extend): keys are transposed into panels and both products run on the GEMM tiles of gemm.inl.
// Where a range of keys is cut depends on the req alone, so its result does not depend on its neighbours.

constexpr int64_t kKeys = 64;         // keys a block holds
constexpr int64_t kTileRows = 96;     // rows a tile holds, about
constexpr int64_t kDirectRows = 8;    // at most so many rows go the direct way
constexpr int64_t kDirectPart = 512;  // keys a direct task visits at most
constexpr int64_t kTiledPart = 4096;  // keys a tiled task visits at most
constexpr float kNegInf = -__builtin_inff();

struct AttentionTask {
  int32_t req;
  int32_t head, heads;          // KV heads [head, head + heads)
  int32_t query, queries;       // of the req's new tokens: [query, query + queries)
  int32_t key_begin, key_end;   // positions this task visits
  int32_t partial;              // first row of its partial results, -1: it writes the output itself
  int32_t parts;                // on the first of several parts of a range: how many; else 0
};

struct AttentionWork {
  const AttentionArgs* args;
  const AttentionTask* tasks;
  float* partials;  // rows of v_head_dim sums, then top and total
  int64_t partial_stride;
};

// The running softmax of one KV head of a task, rows = queries x group.
struct Softmax {
  int64_t rows, stride;
  float* acc;  // [rows, stride]
  float *top, *total;
};

struct KeyRange {
  int64_t first, last;
};

INLINE KeyRange seen_by(const AttentionArgs& a, int64_t req, int64_t query) {
  int64_t seq_len = a.seq_lens[req], position = a.prefix_lens[req] + query;
  if (!a.causal) return {0, seq_len};
  return {a.window ? max1(int64_t(0), position + 1 - a.window) : 0, min1(position + 1, seq_len)};
}

// Scores of one row against a block of keys become weights, and the row's earlier sums are scaled to the new top.
// Key j of the block is at position begin + j; the row sees [range.first, range.last).
INLINE void update_row(const AttentionArgs& a, Softmax& s, int64_t row, float* scores, int64_t begin, int64_t count, KeyRange range) {
  int64_t low = min1(max1(range.first - begin, int64_t(0)), kKeys), high = max1(min1(range.last - begin, count), int64_t(0));
  if (a.soft_cap != 0.0f) {
    for (int64_t j = 0; j < kKeys; j += VL) store(scores + j, tanh(load(scores + j) * (1.0f / a.soft_cap)) * a.soft_cap);
  }
  // Scores of keys outside the range may come from stale slots, NaN included: they are overwritten, not multiplied.
  for (int64_t j = 0; j < low; ++j) scores[j] = kNegInf;
  for (int64_t j = high; j < kKeys; ++j) scores[j] = kNegInf;
  if (low >= high) {
    for (int64_t j = 0; j < kKeys; ++j) scores[j] = 0.0f;
    return;
  }
  vf best = load(scores);
  for (int64_t j = VL; j < kKeys; j += VL) best = max(best, load(scores + j));
  float top = max1(s.top[row], max_lane(best));
  vf sums{};
  for (int64_t j = 0; j < kKeys; j += VL) {
    vf weight = exp(load(scores + j) - top);
    store(scores + j, weight);
    sums += weight;
  }
  float decay = 1.0f;
  if (top != s.top[row]) {
    vf step = exp(splat(s.top[row] - top));
    decay = s.top[row] == kNegInf ? 0.0f : step[0];
    float* acc = s.acc + row * s.stride;
    for (int64_t i = 0; i < s.stride; i += VL) store(acc + i, load(acc + i) * decay);
    s.top[row] = top;
  }
  s.total[row] = s.total[row] * decay + sum(sums);
}

// Two vectors of one cache row. For bf16 they are its even and its odd elements, so q and the sums keep that order too.
INLINE void load_pair(const float* p, vf& a, vf& b) { a = load(p), b = load(p + VL); }
INLINE void load_pair(const uint16_t* p, vf& a, vf& b) {
  vu bits = load_bits(p);
  a = even(bits), b = odd(bits);
}

// Where element i of a row stands in the order of load_pair.
template <typename T>
INLINE int64_t pair_order(int64_t i) {
  if (sizeof(T) == 4) return i;
  int64_t within = i % (2 * VL);
  return i - within + within / 2 + (within % 2) * VL;
}

// Where each key and value of a block begins, of one KV head.
template <typename T>
struct Block {
  const T *keys[kKeys], *values[kKeys];

  INLINE_MEMBER void next_head(int64_t count, int64_t dim, int64_t v_dim) {
    for (int64_t j = 0; j < count; ++j) keys[j] += dim, values[j] += v_dim;
  }
};

// Asks for the next block's rows, a cache line at a time and in the order of addresses, which the rows of one head, being far
// apart, are not: the hardware then sees a stream and runs ahead of it.
template <typename T>
struct Ahead {
  const T* const* rows;  // of the first KV head of the task; those of its other heads follow each
  int64_t count, width;  // rows, and elements to fetch of each
  int64_t row = 0, at = 0;

  INLINE_MEMBER void line() {
    if (row >= count) return;
    __builtin_prefetch(rows[row] + at);
    at += 64 / int64_t(sizeof(T));
    if (at >= width) at = 0, ++row;
  }
  INLINE_MEMBER void lines(int64_t n) {
    for (int64_t i = 0; i < n; ++i) line();
  }
};

// N keys at a time: their sums are independent, which hides the latency of the additions.
template <typename T, int R, int N>
INLINE void score_keys(const T* const* keys, const float* q, int64_t q_stride, int64_t dim, float* scores) {
  vf sums[N][R] = {};
  for (int64_t d = 0; d < dim; d += 2 * VL) {
    UNROLL for (int n = 0; n < N; ++n) {
      vf a, b;
      load_pair(keys[n] + d, a, b);
      UNROLL for (int r = 0; r < R; ++r) {
        accumulate(sums[n][r], a, load(q + r * q_stride + d));
        accumulate(sums[n][r], b, load(q + r * q_stride + d + VL));
      }
    }
  }
  UNROLL for (int n = 0; n < N; ++n) {
    UNROLL for (int r = 0; r < R; ++r) scores[r * kKeys + n] = sum(sums[n][r]);
  }
}

template <typename T, int R>
INLINE void direct_scores(
    const T* const* keys, Ahead<T>& next, int64_t count, const float* q, int64_t q_stride, int64_t dim, float* scores) {
  constexpr int N = R >= 4 ? 2 : 4;
  int64_t j = 0;
  for (; j + N <= count; j += N) {
    next.lines(N * dim * int64_t(sizeof(T)) / 64);
    score_keys<T, R, N>(keys + j, q, q_stride, dim, scores + j);
  }
  for (; j < count; ++j) score_keys<T, R, 1>(keys + j, q, q_stride, dim, scores + j);
}

// acc[r, 0 .. C pairs of vectors) += weights times values, kept in registers over all keys.
template <typename T, int R, int C>
INLINE void value_columns(
    const T* const* values, Ahead<T>& next, int64_t count, int64_t d, const float* weights, float* acc, int64_t acc_stride) {
  vf sums[R][2 * C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) sums[r][c] = load(acc + r * acc_stride + c * VL);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values[j] + d;
    next.lines(C * 2 * VL * int64_t(sizeof(T)) / 64);
    UNROLL for (int c = 0; c < C; ++c) {
      vf a, b;
      load_pair(value + c * 2 * VL, a, b);
      UNROLL for (int r = 0; r < R; ++r) {
        vf weight = splat(weights[r * kKeys + j]);
        accumulate(sums[r][2 * c], a, weight);
        accumulate(sums[r][2 * c + 1], b, weight);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) store(acc + r * acc_stride + c * VL, sums[r][c]);
  }
}

template <typename T, int R>
INLINE void direct_values(
    const T* const* values, Ahead<T>& next, int64_t count, const float* weights, int64_t dim, float* acc, int64_t acc_stride) {
  constexpr int C = R >= 4 ? 1 : 4 / R;
  int64_t d = 0;
  for (; d + C * 2 * VL <= dim; d += C * 2 * VL) value_columns<T, R, C>(values, next, count, d, weights, acc + d, acc_stride);
  for (; d < dim; d += 2 * VL) value_columns<T, R, 1>(values, next, count, d, weights, acc + d, acc_stride);
}

template <typename T, int R>
static void direct_block(
    const AttentionArgs& a, const AttentionTask& t, Softmax& s, int64_t row, const Block<T>& block, Ahead<T>& next_keys,
    Ahead<T>& next_values, const float* q, int64_t q_stride, int64_t begin, int64_t count) {
  float scores[R * kKeys];
  int64_t group = a.num_heads / a.num_kv_heads;
  direct_scores<T, R>(block.keys, next_keys, count, q + row * q_stride, q_stride, a.head_dim, scores);
  // Zeros after the last key: update_row reads whole vectors.
  for (int r = 0; r < R; ++r)
    for (int64_t j = count; j < kKeys; ++j) scores[r * kKeys + j] = 0.0f;
  int64_t low = count, high = 0;  // keys that any of the rows sees: the values of others may be NaN
  for (int r = 0; r < R; ++r) {
    KeyRange range = seen_by(a, t.req, t.query + (row + r) / group);
    update_row(a, s, row + r, scores + r * kKeys, begin, count, range);
    low = min1(low, max1(int64_t(0), range.first - begin));
    high = max1(high, min1(count, range.last - begin));
  }
  if (low >= high) return;
  direct_values<T, R>(
      block.values + low, next_values, high - low, scores + low, a.v_head_dim, s.acc + row * s.stride, s.stride);
}

// Addresses of a block's keys and values.
template <typename T>
INLINE void find_keys(const AttentionArgs& a, const AttentionTask& t, int64_t begin, int64_t count, Block<T>& block) {
  const int32_t* pages = a.page_table + t.req * a.num_columns;
  int64_t column = begin / a.page_size, offset = begin % a.page_size;
  for (int64_t j = 0; j < count; ++j) {
    int64_t row = (int64_t(pages[column]) * a.page_size + offset) * a.num_kv_heads + t.head;
    block.keys[j] = static_cast<const T*>(a.k_cache) + row * a.head_dim;
    block.values[j] = static_cast<const T*>(a.v_cache) + row * a.v_head_dim;
    if (++offset == a.page_size) offset = 0, ++column;
  }
}

typedef uint32_t v8 __attribute__((vector_size(32), may_alias, aligned(4)));

// out[i * 16 + j] = in[j][i] for 8 rows j and 8 words i.
INLINE void transpose8(const uint32_t* const* in, int64_t at, uint32_t* out) {
  v8 x[8], y[8];
  UNROLL for (int j = 0; j < 8; ++j) x[j] = *reinterpret_cast<const v8*>(in[j] + at);
  UNROLL for (int j = 0; j < 8; j += 2) {
    y[j] = __builtin_shuffle(x[j], x[j + 1], (v8){0, 8, 1, 9, 4, 12, 5, 13});
    y[j + 1] = __builtin_shuffle(x[j], x[j + 1], (v8){2, 10, 3, 11, 6, 14, 7, 15});
  }
  UNROLL for (int j = 0; j < 8; j += 4) {
    UNROLL for (int h = 0; h < 2; ++h) {
      x[j + 2 * h] = __builtin_shuffle(y[j + h], y[j + 2 + h], (v8){0, 1, 8, 9, 4, 5, 12, 13});
      x[j + 2 * h + 1] = __builtin_shuffle(y[j + h], y[j + 2 + h], (v8){2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<v8*>(out + i * 16) = __builtin_shuffle(x[i], x[i + 4], (v8){0, 1, 2, 3, 8, 9, 10, 11});
    *reinterpret_cast<v8*>(out + (i + 4) * 16) = __builtin_shuffle(x[i], x[i + 4], (v8){4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// A block of keys as the weight panels of gemm.inl: 16 keys are the columns, the head dim is k. Rows past `count` are
// whatever row 0 holds; their scores are masked.
template <typename T>
static void pack_keys(const T* const* keys, int64_t count, int64_t dim, char* out) {
  constexpr int64_t per_word = 4 / sizeof(T);
  int64_t depth = ceil_div(dim, 2) * 2, words = dim / per_word;
  for (int64_t first = 0; first < count; first += kPanel) {
    uint32_t* panel = reinterpret_cast<uint32_t*>(out + first * depth * int64_t(sizeof(T)));
    for (int64_t half = 0; half < kPanel; half += 8) {
      const uint32_t* rows[8];
      for (int64_t j = 0; j < 8; ++j) {
        int64_t key = first + half + j;
        rows[j] = reinterpret_cast<const uint32_t*>(keys[key < count ? key : 0]);
      }
      int64_t i = 0;
      if (dim % 2 == 0)
        for (; i + 8 <= words; i += 8) transpose8(rows, i, panel + i * kPanel + half);
      // What is left, and odd dims, whose rows of bf16 are not aligned to words.
      for (int64_t d = i * per_word; d < depth; ++d) {
        for (int64_t j = 0; j < 8; ++j) {
          T value = d < dim ? reinterpret_cast<const T*>(rows[j])[d] : T(0);
          T* column = reinterpret_cast<T*>(panel) + (d / per_word * kPanel + half + j) * per_word;
          column[d % per_word] = value;
        }
      }
    }
  }
}

// A block of values as weight panels: 16 elements of the value head are the columns, the keys are k. Keys outside
// [low, high), which no row sees, are zeros: their slots may hold NaN.
template <typename T>
static void pack_values(const T* const* values, int64_t low, int64_t high, int64_t dim, char* out) {
  constexpr int64_t size = sizeof(T);
  for (int64_t key = 0; key < kKeys; ++key) {
    bool inside = key >= low && key < high;
    for (int64_t first = 0; first < dim; first += kPanel) {
      T* panel = reinterpret_cast<T*>(out + first * kKeys * size);
      int64_t width = min1(kPanel, dim - first);
      if (size == 4) {
        for (int64_t j = 0; j < kPanel; ++j) panel[key * kPanel + j] = inside && j < width ? values[key][first + j] : T(0);
      } else {
        T* pair = panel + key / 2 * kPanel * 2 + key % 2;
        if (inside && width == kPanel) {
          const T* row = values[key] + first;
          UNROLL for (int64_t j = 0; j < kPanel; ++j) pair[j * 2] = row[j];
        } else {
          for (int64_t j = 0; j < kPanel; ++j) pair[j * 2] = inside && j < width ? values[key][first + j] : T(0);
        }
      }
    }
  }
}

// c (+)= a [rows, 2 * pairs] times `panels` weight panels.
template <Path P>
static void product(
    const float* a, int64_t a_stride, int64_t rows, const char* w, int64_t panels, int64_t pairs, float* c, int64_t c_stride, bool add) {
  static constexpr Tiles<P> tiles;
  int64_t panel_bytes = pairs * (P == Path::f32 ? 128 : 64), groups = ceil_div(rows, kMaxRows);
  for (int64_t g = 0; g < groups; ++g) {
    int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
    int64_t step = panels_at_once(int(size)), p = 0;
    const float* ap = a + start * a_stride;
    float* cp = c + start * c_stride;
    for (; p + step <= panels; p += step)
      tiles.many[size](ap, a_stride, w + p * panel_bytes, panel_bytes, pairs, cp + p * kPanel, c_stride, add);
    for (; p < panels; ++p)
      tiles.one[size](ap, a_stride, w + p * panel_bytes, panel_bytes, pairs, cp + p * kPanel, c_stride, add);
  }
}

template <typename T>
static void tiled_block(
    const AttentionArgs& a, const AttentionTask& t, Softmax& s, const Block<T>& block, const float* q, int64_t q_stride,
    int64_t begin, int64_t count) {
  constexpr Path P = sizeof(T) == 4 ? Path::f32 : Path::bf16;
  int64_t depth = ceil_div(a.head_dim, 2) * 2, panels = ceil_div(count, kPanel), group = a.num_heads / a.num_kv_heads;
  // One vector more than the keys, so that rows do not share their L1 sets.
  int64_t stride = kKeys + 16;
  float* scores = static_cast<float*>(scratch(kSlotScores, size_t(s.rows * stride) * sizeof(float)));
  char* packed_k = static_cast<char*>(scratch(kSlotKeys, size_t(kKeys * depth) * sizeof(T)));
  char* packed_v = static_cast<char*>(scratch(kSlotValues, size_t(kKeys * s.stride) * sizeof(T)));
  // Queries that see nothing of this block are left out at both ends of the tile.
  int64_t from = t.queries, to = 0, low = count, high = 0;
  for (int64_t i = 0; i < t.queries; ++i) {
    KeyRange range = seen_by(a, t.req, t.query + i);
    if (range.first >= begin + count || range.last <= begin) continue;
    from = min1(from, i), to = i + 1;
    low = min1(low, max1(int64_t(0), range.first - begin));
    high = max1(high, min1(count, range.last - begin));
  }
  if (from >= to) return;
  int64_t row0 = from * group, rows = (to - from) * group;

  pack_keys<T>(block.keys, count, a.head_dim, packed_k);
  product<P>(q + row0 * q_stride, q_stride, rows, packed_k, panels, depth / 2, scores, stride, false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = panels * kPanel; j < kKeys; ++j) scores[r * stride + j] = 0.0f;
    update_row(a, s, row0 + r, scores + r * stride, begin, count, seen_by(a, t.req, t.query + (row0 + r) / group));
  }
  pack_values<T>(block.values, low, high, a.v_head_dim, packed_v);
  product<P>(scores, stride, rows, packed_v, s.stride / kPanel, kKeys / 2, s.acc + row0 * s.stride, s.stride, true);
}

INLINE bool is_direct(const AttentionArgs& a, int64_t rows) {
  return rows <= kDirectRows && a.head_dim % (2 * VL) == 0 && a.v_head_dim % (2 * VL) == 0;
}

// The queries of one KV head in float32, scaled, in the order that the keys are read.
template <typename T>
static void load_queries(const AttentionArgs& a, const AttentionTask& t, int64_t head, bool direct, float* out, int64_t stride) {
  int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
  for (int64_t i = 0; i < t.queries; ++i) {
    int64_t token = a.cu_extend[t.req] + t.query + i;
    for (int64_t g = 0; g < group; ++g) {
      int64_t at = token * a.q.stride + (head * group + g) * dim;
      float* row = out + (i * group + g) * stride;
      for (int64_t d = 0; d < dim; ++d) row[direct ? pair_order<T>(d) : d] = load1(a.q.data, a.q.dtype, at + d) * a.scale;
      for (int64_t d = dim; d < stride; ++d) row[d] = 0.0f;
    }
  }
}

INLINE void write_row(const AttentionArgs& a, int64_t token, int64_t head, const float* acc, float top, float total, bool permuted) {
  float scale = total > 0.0f ? 1.0f / total : 0.0f;
  int64_t at = token * a.out.stride + head * a.v_head_dim;
  for (int64_t d = 0; d < a.v_head_dim; ++d) {
    float x = acc[permuted ? pair_order<uint16_t>(d) : d] * scale;
    if (a.out.dtype == DType::bf16)
      static_cast<uint16_t*>(a.out.data)[at + d] = to_bf16(x);
    else
      static_cast<float*>(a.out.data)[at + d] = x;
  }
  if (a.lse) a.lse[token * a.num_heads + head] = total > 0.0f ? __builtin_logf(total) + top : kNegInf;
}

template <typename T>
static void direct_rows(
    const AttentionArgs& a, const AttentionTask& t, Softmax& s, const Block<T>& block, Ahead<T>& next_keys,
    Ahead<T>& next_values, const float* q, int64_t q_stride, int64_t begin, int64_t count) {
  int64_t row = 0;
  for (; row + 4 <= s.rows; row += 4) direct_block<T, 4>(a, t, s, row, block, next_keys, next_values, q, q_stride, begin, count);
  for (; row + 2 <= s.rows; row += 2) direct_block<T, 2>(a, t, s, row, block, next_keys, next_values, q, q_stride, begin, count);
  for (; row < s.rows; ++row) direct_block<T, 1>(a, t, s, row, block, next_keys, next_values, q, q_stride, begin, count);
}

template <typename T>
static void attention_task(const AttentionWork& work, const AttentionTask& t) {
  const AttentionArgs& a = *work.args;
  int64_t group = a.num_heads / a.num_kv_heads, rows = t.queries * group, all_rows = t.heads * rows;
  bool direct = is_direct(a, rows), permuted = direct && sizeof(T) == 2;
  int64_t q_stride = ceil_div(a.head_dim, 16) * 16 + 16, stride = ceil_div(a.v_head_dim, kPanel) * kPanel;
  float* q = static_cast<float*>(scratch(kSlotState, size_t(all_rows * (q_stride + stride + 2)) * sizeof(float)));
  float* acc = q + all_rows * q_stride;
  float* top = acc + all_rows * stride;
  float* total = top + all_rows;
  auto softmax = [&](int64_t h) __attribute__((always_inline)) {
    return Softmax{rows, stride, acc + h * rows * stride, top + h * rows, total + h * rows};
  };
  for (int64_t i = 0; i < all_rows * stride; ++i) acc[i] = 0.0f;
  // The sink is a key with no value; of several parts of a range only the first counts it.
  bool sinks = a.sinks && (t.partial < 0 || t.parts > 0);
  for (int64_t h = 0; h < t.heads; ++h) {
    load_queries<T>(a, t, t.head + h, direct, q + h * rows * q_stride, q_stride);
    for (int64_t r = 0; r < rows; ++r) {
      top[h * rows + r] = sinks ? a.sinks[(t.head + h) * group + r % group] : kNegInf;
      total[h * rows + r] = sinks ? 1.0f : 0.0f;
    }
  }

  Block<T> first, second;  // this block's rows and those of the next one to visit
  int64_t count = min1(kKeys, t.key_end - t.key_begin), next_count;
  for (int64_t begin = t.key_begin; begin < t.key_end; begin += kKeys, count = next_count) {
    next_count = max1(int64_t(0), min1(kKeys, t.key_end - begin - kKeys));
    find_keys<T>(a, t, begin, count, first);
    find_keys<T>(a, t, begin + kKeys, next_count, second);
    Ahead<T> next_keys{second.keys, next_count, t.heads * a.head_dim}, next_values{second.values, next_count, t.heads * a.v_head_dim};
    for (int64_t h = 0; h < t.heads; ++h) {
      Softmax s = softmax(h);
      const float* head_q = q + h * rows * q_stride;
      if (direct)
        direct_rows<T>(a, t, s, first, next_keys, next_values, head_q, q_stride, begin, count);
      else
        tiled_block<T>(a, t, s, first, head_q, q_stride, begin, count);
      first.next_head(count, a.head_dim, a.v_head_dim);
    }
  }

  for (int64_t i = 0; i < all_rows; ++i) {
    int64_t r = i % rows;
    if (t.partial < 0) {
      int64_t token = a.cu_extend[t.req] + t.query + r / group;
      write_row(a, token, (t.head + i / rows) * group + r % group, acc + i * stride, top[i], total[i], permuted);
    } else {
      float* part = work.partials + (t.partial + i) * work.partial_stride;
      for (int64_t d = 0; d < a.v_head_dim; ++d) part[d] = acc[i * stride + (permuted ? pair_order<T>(d) : d)];
      part[a.v_head_dim] = top[i], part[a.v_head_dim + 1] = total[i];
    }
  }
}

static void attention_one(const void* opaque, int64_t index) {
  const AttentionWork& work = *static_cast<const AttentionWork*>(opaque);
  if (work.args->kv_dtype == DType::bf16)
    attention_task<uint16_t>(work, work.tasks[index]);
  else
    attention_task<float>(work, work.tasks[index]);
}

// Sums the parts of one range into the output. The parts of a range follow each other, and so do their rows of partials.
static void merge_one(const void* opaque, int64_t index) {
  const AttentionWork& work = *static_cast<const AttentionWork*>(opaque);
  const AttentionArgs& a = *work.args;
  const AttentionTask& t = work.tasks[index];
  if (t.parts == 0) return;
  int64_t group = a.num_heads / a.num_kv_heads, rows = t.queries * group, all_rows = t.heads * rows;
  float* acc = static_cast<float*>(scratch(kSlotState, size_t(a.v_head_dim) * sizeof(float)));
  for (int64_t r = 0; r < all_rows; ++r) {
    auto part = [&](int64_t i) __attribute__((always_inline)) {
      return work.partials + (t.partial + i * all_rows + r) * work.partial_stride;
    };
    float top = kNegInf, total = 0.0f;
    for (int64_t i = 0; i < t.parts; ++i) top = max1(top, part(i)[a.v_head_dim]);
    for (int64_t d = 0; d < a.v_head_dim; ++d) acc[d] = 0.0f;
    for (int64_t i = 0; i < t.parts && top != kNegInf; ++i) {
      const float* p = part(i);
      float scale = p[a.v_head_dim] == kNegInf ? 0.0f : exp(splat(p[a.v_head_dim] - top))[0];
      total += p[a.v_head_dim + 1] * scale;
      for (int64_t d = 0; d < a.v_head_dim; ++d) acc[d] += p[d] * scale;
    }
    int64_t token = a.cu_extend[t.req] + t.query + r % rows / group;
    write_row(a, token, (t.head + r / rows) * group + r % group, acc, top, total, false);
  }
}

// Calls visit(req, query, queries, key_begin, key_end) for every tile of queries, the last ones of a req, which see most, first.
template <typename F>
INLINE void each_tile(const AttentionArgs& a, F visit) {
  int64_t length = max1(int64_t(1), kTileRows / (a.num_heads / a.num_kv_heads));
  for (int64_t req = 0; req < a.num_reqs; ++req) {
    int64_t extend = a.cu_extend[req + 1] - a.cu_extend[req];
    for (int64_t tile = ceil_div(extend, length) - 1; tile >= 0; --tile) {
      int64_t query = tile * length, queries = min1(length, extend - query);
      int64_t begin = seen_by(a, req, query).first, end = seen_by(a, req, query + queries - 1).last;
      visit(req, query, queries, min1(begin, end), end);
    }
  }
}

// Cuts the batch into tasks; with `tasks` null it only counts them. Returns the count; partial_rows: rows of partial results.
static int64_t cut(const AttentionArgs& a, int64_t direct_heads, AttentionTask* tasks, int64_t& partial_rows) {
  int64_t count = 0, group = a.num_heads / a.num_kv_heads;
  partial_rows = 0;
  each_tile(a, [&](int64_t req, int64_t query, int64_t queries, int64_t begin, int64_t end) __attribute__((always_inline)) {
    bool direct = is_direct(a, queries * group);
    int64_t length = direct ? kDirectPart : kTiledPart, heads = direct ? direct_heads : 1;
    int64_t parts = max1(int64_t(1), ceil_div(end - begin, length));
    for (int64_t head = 0; head < a.num_kv_heads; head += heads) {
      int64_t some = min1(heads, a.num_kv_heads - head);
      for (int64_t i = 0; i < parts; ++i, ++count) {
        if (tasks)
          tasks[count] = {int32_t(req), int32_t(head), int32_t(some), int32_t(query), int32_t(queries),
                          int32_t(begin + i * length), int32_t(min1(end, begin + (i + 1) * length)),
                          parts > 1 ? int32_t(partial_rows) : -1, parts > 1 && i == 0 ? int32_t(parts) : 0};
        if (parts > 1) partial_rows += some * queries * group;
      }
    }
  });
  return count;
}

static void attention(const AttentionArgs& a) {
  // All KV heads in one task read pages from end to end; fewer where there would be too few tasks to go round.
  int64_t heads = a.num_kv_heads, partial_rows = 0, count = cut(a, heads, nullptr, partial_rows);
  while (heads > 1 && num_threads() > 1 && count < 4 * num_threads()) {
    heads = ceil_div(heads, 2);
    count = cut(a, heads, nullptr, partial_rows);
  }
  auto* tasks = static_cast<AttentionTask*>(scratch(kSlotPartials, size_t(count) * sizeof(AttentionTask)));
  cut(a, heads, tasks, partial_rows);
  AttentionWork work{&a, tasks, nullptr, a.v_head_dim + 2};
  if (partial_rows)
    work.partials = static_cast<float*>(scratch(kSlotActivations, size_t(partial_rows * work.partial_stride) * sizeof(float)));
  run_tasks(count, attention_one, &work);
  if (partial_rows) run_tasks(count, merge_one, &work);
}

static void kv_write_one(const void* opaque, int64_t token) {
  const KvWriteArgs& a = *static_cast<const KvWriteArgs*>(opaque);
  auto write = [&](const Rows& from, void* cache, int64_t width) __attribute__((always_inline)) {
    int64_t at = int64_t(a.slots[token]) * width;
    if (from.dtype == a.kv_dtype) {
      int64_t size = from.dtype == DType::bf16 ? 2 : 4;
      __builtin_memcpy(static_cast<char*>(cache) + at * size, static_cast<const char*>(from.data) + token * from.stride * size,
                       size_t(width * size));
      return;
    }
    for (int64_t i = 0; i < width; ++i) {
      float x = load1(from.data, from.dtype, token * from.stride + i);
      if (a.kv_dtype == DType::bf16)
        static_cast<uint16_t*>(cache)[at + i] = to_bf16(x);
      else
        static_cast<float*>(cache)[at + i] = x;
    }
  };
  write(a.k, a.k_cache, a.k_width);
  write(a.v, a.v_cache, a.v_width);
}

static void kv_write(const KvWriteArgs& args) {
  // Few tokens are copied faster than threads are woken. In order, so that of padding writes to one slot the last stays.
  if (args.num_tokens <= 32)
    for (int64_t token = 0; token < args.num_tokens; ++token) kv_write_one(&args, token);
  else
    run_tasks(args.num_tokens, kv_write_one, &args);
}
