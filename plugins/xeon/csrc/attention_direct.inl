// Few rows (decode): both products straight from where keys and values are, each loaded once for up to four rows.
// Rows must be a whole number of pairs of vectors long.
//
// Memory decides its speed, and so does the order of reading. The KV heads of one token lie side by side, so it goes through all
// of them for a few tokens before it takes the next ones: what the core reads is then nearly in the order of addresses, and the
// prefetchers of its L2 cache run ahead of it. They stop at the end of a page of the pool; what is asked for by instruction
// crosses it.

constexpr int64_t kDirectRows = 8;  // at most so many rows go this way

INLINE bool is_direct(const AttentionArgs& a, int64_t rows) {
  return !a.latent && rows <= kDirectRows && a.k.dim % (2 * VL) == 0 && a.v.dim % (2 * VL) == 0;
}

constexpr int64_t kKeysAhead = 16;  // keys between what is read and what is asked for: a page of the pool, as a rule
// Keys whose values are summed before the next KV head's turn. Twice as many of more than four rows, where arithmetic is the
// bound and loading and storing sums is a part of it.
constexpr int64_t kValueKeys = 8;

template <int N>
struct Size {
  static constexpr int value = N;
};

// f(Size, first row) for all rows, four, two or one at once.
template <typename F>
INLINE void by_rows(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(Size<4>{}, row);
  for (; row + 2 <= rows; row += 2) f(Size<2>{}, row);
  for (; row < rows; ++row) f(Size<1>{}, row);
}

// Elements i of a pair of vectors of a row: where queries and sums have them.
template <typename T>
INLINE int64_t query_order(int64_t i) {
#ifdef HAS_DOT_BF16
  return i;
#else
  if (sizeof(T) != 2 || kPath<T> == Path::f32) return i;
  int64_t within = i % (2 * VL);  // as load_pair has them: even ones, then odd ones
  return i - within + within / 2 + (within % 2) * VL;
#endif
}

template <typename T>
INLINE int64_t sum_order(int64_t i) {
#ifdef HAS_DOT_BF16
  int64_t within = i % (2 * VL);  // as `interleave` leaves them: of each 8 the first four, then the others
  return i - within + within % 8 / 4 * VL + within / 8 * 4 + within % 4;
#else
  return query_order<T>(i);
#endif
}

#ifdef HAS_DOT_BF16
// Half the sums, each lane group of `Step` of two of them added up side by side.
template <int Step>
INLINE void fold(vf (&sums)[16]) {
  vi low, high;
  UNROLL for (int i = 0; i < 16; ++i) {
    low[i] = i / (2 * Step) * (2 * Step) + i % Step + (i / Step % 2 ? 16 : 0);
    high[i] = low[i] + Step;
  }
  UNROLL for (int i = 0; i < Step; ++i)
    sums[i] = __builtin_shuffle(sums[i], sums[i + Step], low) + __builtin_shuffle(sums[i], sums[i + Step], high);
}

// The lanes of sums[i] added up become lane i.
INLINE vf sum_each(vf (&sums)[16]) {
  fold<8>(sums);
  fold<4>(sums);
  fold<2>(sums);
  fold<1>(sums);
  return sums[0];
}

// sums[r * N + n] += products of row r with key n, lane by lane.
template <typename T, int R>
INLINE void add_products(vf (&sums)[16], const T* const (&keys)[16 / R], const uint16_t* q, int64_t q_stride, int64_t dim) {
  constexpr int N = 16 / R;
  for (int64_t d = 0; d < dim; d += 2 * VL) {
    UNROLL for (int n = 0; n < N; ++n) {
      vpairs key = load_bf16s(keys[n] + d);
      UNROLL for (int r = 0; r < R; ++r) dot(sums[r * N + n], key, load_bf16s(q + r * q_stride + d));
    }
  }
}

// 16 scores at a time: R rows against 16 / R keys. `offset`: of the KV head in a row of the store. `lines` are asked for with
// each key.
template <typename T, int R>
INLINE void direct_scores(
    const T* const* keys, int64_t offset, Ahead<T>& next, int64_t lines, int64_t count, const uint16_t* q, int64_t q_stride,
    int64_t dim, float* scores) {
  constexpr int N = 16 / R;
  for (int64_t j = 0; j < count; j += N) {
    const T* some[N];
    UNROLL for (int n = 0; n < N; ++n) some[n] = keys[min1(j + n, count - 1)] + offset;
    next.lines(N * lines);
    vf sums[16] = {};
    add_products<T, R>(sums, some, q, q_stride, dim);
    vf all = sum_each(sums);
    UNROLL for (int r = 0; r < R; ++r)
      __builtin_memcpy(scores + r * kKeys + j, reinterpret_cast<const float*>(&all) + r * N, N * sizeof(float));
  }
}

// The elements of two rows side by side, as pairs.
INLINE void interleave(vpairs a, vpairs b, vpairs& first, vpairs& second) {
  vpairs low, high;
  UNROLL for (int i = 0; i < 2 * VL; ++i) {
    low[i] = uint16_t(i / 8 * 8 + i % 8 / 2 + (i % 2) * 2 * VL);
    high[i] = uint16_t(low[i] + 4);
  }
  first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
}

// acc[r, 0 .. C pairs of vectors) += weights times values, kept in registers over all keys. Keys in pairs: after an odd count
// the weight is zero, and the value any.
template <typename T, int R, int C>
INLINE void value_columns(
    const T* const* values, int64_t offset, Ahead<T>& next, int64_t count, const uint16_t* weights, float* acc,
    int64_t acc_stride) {
  vf sums[R][2 * C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) sums[r][c] = load(acc + r * acc_stride + c * VL);
  }
  for (int64_t j = 0; j < count; j += 2) {
    const T *value = values[j] + offset, *other = values[min1(j + 1, count - 1)] + offset;
    next.lines(2 * C * 2 * VL * int64_t(sizeof(T)) / 64);
    UNROLL for (int c = 0; c < C; ++c) {
      vpairs first, second;
      interleave(load_bf16s(value + c * 2 * VL), load_bf16s(other + c * 2 * VL), first, second);
      UNROLL for (int r = 0; r < R; ++r) {
        uint32_t pair;
        __builtin_memcpy(&pair, weights + r * kKeys + j, 4);
        accumulate_pairs(sums[r][2 * c], (vu)first, pair);
        accumulate_pairs(sums[r][2 * c + 1], (vu)second, pair);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) store(acc + r * acc_stride + c * VL, sums[r][c]);
  }
}
#else
// Two vectors of one row. For bf16 they are its even and its odd elements, so queries and sums keep that order too.
template <typename T>
INLINE void load_pair(const T* p, vf& a, vf& b) {
  a = load(p), b = load(p + VL);
}
INLINE void load_pair(const uint16_t* p, vf& a, vf& b) {
  vu bits = load_bits(p);
  a = even(bits), b = odd(bits);
}

// N keys at a time: their sums are independent, which hides the latency of the additions.
template <typename T, int R, int N>
INLINE void score_keys(const T* const* keys, int64_t offset, const float* q, int64_t q_stride, int64_t dim, float* scores) {
  vf sums[N][R] = {};
  for (int64_t d = 0; d < dim; d += 2 * VL) {
    UNROLL for (int n = 0; n < N; ++n) {
      vf a, b;
      load_pair(keys[n] + offset + d, a, b);
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
    const T* const* keys, int64_t offset, Ahead<T>& next, int64_t lines, int64_t count, const float* q, int64_t q_stride,
    int64_t dim, float* scores) {
  constexpr int N = R >= 4 ? 2 : 4;
  int64_t j = 0;
  for (; j + N <= count; j += N) {
    next.lines(N * lines);
    score_keys<T, R, N>(keys + j, offset, q, q_stride, dim, scores + j);
  }
  for (; j < count; ++j) score_keys<T, R, 1>(keys + j, offset, q, q_stride, dim, scores + j);
}

// acc[r, 0 .. C pairs of vectors) += weights times values, kept in registers over all keys.
template <typename T, int R, int C>
INLINE void value_columns(
    const T* const* values, int64_t offset, Ahead<T>& next, int64_t count, const float* weights, float* acc, int64_t acc_stride) {
  vf sums[R][2 * C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) sums[r][c] = load(acc + r * acc_stride + c * VL);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values[j] + offset;
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
#endif

template <typename T, int R>
INLINE void direct_values(
    const T* const* values, int64_t offset, Ahead<T>& next, int64_t count, const Operand* weights, int64_t dim, float* acc,
    int64_t acc_stride) {
  constexpr int C = R >= 4 ? 1 : 4 / R;
  int64_t d = 0;
  for (; d + C * 2 * VL <= dim; d += C * 2 * VL)
    value_columns<T, R, C>(values, offset + d, next, count, weights, acc + d, acc_stride);
  for (; d < dim; d += 2 * VL) value_columns<T, R, 1>(values, offset + d, next, count, weights, acc + d, acc_stride);
}

template <typename T>
static void direct_block(
    const AttentionArgs& a, const AttentionTask& t, TaskState& state, const Block<T>& block, int64_t begin, int64_t count,
    int64_t found) {
  int64_t rows = state.rows, all_rows = t.heads * rows, group = a.group();
  Softmax& s = state.softmax;
  float* scores = static_cast<float*>(scratch(kSlotScores, size_t(all_rows * kKeys) * (sizeof(float) + sizeof(Operand))));
  Operand* weights = reinterpret_cast<Operand*>(scores + all_rows * kKeys);
  Ahead<T> next_keys{block.first + kKeysAhead, found - kKeysAhead, t.heads * a.k.dim};
  Ahead<T> next_values{block.second + kKeysAhead, found - kKeysAhead, t.heads * a.v.dim};

  // As many keys as make up 16 scores with the fewest rows that are taken at once, of four, two and one.
  int64_t step = rows % 2 ? 16 : rows % 4 ? 8 : 4, lines = ceil_div(a.k.dim * int64_t(sizeof(T)), 64);
  for (int64_t j = 0; j < count; j += step) {
    for (int64_t h = 0; h < t.heads; ++h) {
      auto score = [&](auto size, int64_t row) __attribute__((always_inline)) {
        int64_t at = h * rows + row;
        direct_scores<T, size.value>(
            block.first + j, h * a.k.dim, next_keys, lines, min1(step, count - j), state.q + at * state.q_stride, state.q_stride,
            a.k.dim, scores + at * kKeys + j);
      };
      by_rows(rows, score);
    }
  }

  Scales scales;
  for (int64_t h = 0; h < t.heads; ++h) {
    if (a.scaled()) {
      find_scales(a.k, a.num_kv_heads, t.head + h, block.tokens, count, scales.first);
      find_scales(a.v, a.num_kv_heads, t.head + h, block.tokens, count, scales.second);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + (h * rows + r) * kKeys;
      // Zeros after the last key: update_row reads whole vectors.
      for (int64_t j = count; j < kKeys; ++j) row[j] = 0.0f;
      update_row(a, s, h * rows + r, row, weights + (h * rows + r) * kKeys, a.scaled() ? scales.first : nullptr,
                 a.scaled() ? scales.second : nullptr, begin, count, seen_by(a, t, r / group));
    }
  }

  int64_t low = count, high = 0;  // keys that any of the queries sees: the values of others may be NaN
  for (int64_t i = 0; i < t.queries; ++i) {
    Seen seen = seen_by(a, t, i);
    low = min1(low, max1(int64_t(0), seen.first - begin));
    high = max1(high, min1(count, seen.last - begin));
  }
  int64_t value_keys = rows > 4 ? 2 * kValueKeys : kValueKeys;
  low = low / 2 * 2;  // a pair's other key is in the task's range or has a weight of zero; see value_columns
  for (int64_t j = low; j < high; j += value_keys) {
    for (int64_t h = 0; h < t.heads; ++h) {
      auto add = [&](auto size, int64_t row) __attribute__((always_inline)) {
        int64_t at = h * rows + row;
        direct_values<T, size.value>(
            block.second + j, h * a.v.dim, next_values, min1(value_keys, high - j), weights + at * kKeys + j, a.v.dim,
            s.acc + at * s.stride, s.stride);
      };
      by_rows(rows, add);
    }
  }
}
