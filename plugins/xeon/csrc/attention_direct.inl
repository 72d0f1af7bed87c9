// Few rows (decode): both products straight from where keys and values are, each loaded once for up to four rows.
// Rows must be a whole number of pairs of vectors long.

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

// 16 scores at a time: R rows against 16 / R keys.
template <typename T, int R>
INLINE void direct_scores(
    const T* const* keys, Ahead<T>& next, int64_t count, const uint16_t* q, int64_t q_stride, int64_t dim, float* scores) {
  constexpr int N = 16 / R;
  for (int64_t j = 0; j < count; j += N) {
    const T* some[N];
    UNROLL for (int n = 0; n < N; ++n) some[n] = keys[min1(j + n, count - 1)];
    next.lines(N * dim * int64_t(sizeof(T)) / 64);
    vf sums[16] = {};
    for (int64_t d = 0; d < dim; d += 2 * VL) {
      UNROLL for (int n = 0; n < N; ++n) {
        vpairs key = load_bf16s(some[n] + d);
        UNROLL for (int r = 0; r < R; ++r) dot(sums[r * N + n], key, load_bf16s(q + r * q_stride + d));
      }
    }
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
    const T* const* values, Ahead<T>& next, int64_t count, int64_t d, const uint16_t* weights, float* acc, int64_t acc_stride) {
  vf sums[R][2 * C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < 2 * C; ++c) sums[r][c] = load(acc + r * acc_stride + c * VL);
  }
  for (int64_t j = 0; j < count; j += 2) {
    const T *value = values[j] + d, *other = values[min1(j + 1, count - 1)] + d;
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
#endif

template <typename T, int R>
INLINE void direct_values(
    const T* const* values, Ahead<T>& next, int64_t count, const Operand* weights, int64_t dim, float* acc, int64_t acc_stride) {
  constexpr int C = R >= 4 ? 1 : 4 / R;
  int64_t d = 0;
  for (; d + C * 2 * VL <= dim; d += C * 2 * VL) value_columns<T, R, C>(values, next, count, d, weights, acc + d, acc_stride);
  for (; d < dim; d += 2 * VL) value_columns<T, R, 1>(values, next, count, d, weights, acc + d, acc_stride);
}

template <typename T, int R>
static void direct_block(
    const AttentionArgs& a, const AttentionTask& t, Softmax& s, int64_t row, const Block<T>& block, const Scales* scales,
    Ahead<T>& next_keys, Ahead<T>& next_values, const Operand* q, int64_t q_stride, int64_t begin, int64_t count) {
  alignas(64) float scores[R * kKeys];
  alignas(64) Operand weights[R * kKeys];
  direct_scores<T, R>(block.first, next_keys, count, q + row * q_stride, q_stride, a.k.dim, scores);
  // Zeros after the last key: update_row reads whole vectors.
  for (int r = 0; r < R; ++r)
    for (int64_t j = count; j < kKeys; ++j) scores[r * kKeys + j] = 0.0f;
  int64_t low = count, high = 0;  // keys that any of the rows sees: the values of others may be NaN
  for (int r = 0; r < R; ++r) {
    Seen seen = seen_by(a, t.req, t.query + (row + r) / a.group());
    update_row(a, s, row + r, scores + r * kKeys, weights + r * kKeys, scales ? scales->first : nullptr,
               scales ? scales->second : nullptr, begin, count, seen);
    low = min1(low, max1(int64_t(0), seen.first - begin));
    high = max1(high, min1(count, seen.last - begin));
  }
  low = low / 2 * 2;  // a pair's other key is in the task's range or has a weight of zero; see value_columns
  if (low >= high) return;
  direct_values<T, R>(block.second + low, next_values, high - low, weights + low, a.v.dim, s.acc + row * s.stride, s.stride);
}

template <typename T>
static void direct_rows(
    const AttentionArgs& a, const AttentionTask& t, Softmax& s, const Block<T>& block, const Scales* scales, Ahead<T>& next_keys,
    Ahead<T>& next_values, const Operand* q, int64_t q_stride, int64_t begin, int64_t count) {
  int64_t row = 0;
  for (; row + 4 <= s.rows; row += 4)
    direct_block<T, 4>(a, t, s, row, block, scales, next_keys, next_values, q, q_stride, begin, count);
  for (; row + 2 <= s.rows; row += 2)
    direct_block<T, 2>(a, t, s, row, block, scales, next_keys, next_values, q, q_stride, begin, count);
  for (; row < s.rows; ++row)
    direct_block<T, 1>(a, t, s, row, block, scales, next_keys, next_values, q, q_stride, begin, count);
}
