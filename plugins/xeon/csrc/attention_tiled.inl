// Many rows (extend, latents): a block of keys and of values is laid out in panels, and both products run on the tiles of gemm.inl.
// With VDPBF16PS, and on AMX tiles, queries, keys, weights and values are multiplied as bf16, else in float32.

constexpr int64_t kTileRows = 96;  // rows a tile holds, about

template <bool Wide>
struct PanelElement {
  using Type = uint16_t;
};
template <>
struct PanelElement<true> {
  using Type = float;
};
template <typename T>
using Panel = typename PanelElement<kPath<T> == Path::f32>::Type;

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

INLINE int64_t even_up(int64_t n) { return (n + 1) / 2 * 2; }

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

// 8 of a panel's 16 columns from the rows of 8 keys.
template <typename E>
static void pack_columns(const E* const* keys, int64_t dim, uint32_t* columns) {
  constexpr int64_t per_word = 4 / sizeof(E);
  int64_t i = 0, words = dim / per_word;
  const uint32_t* rows[8];
  for (int64_t j = 0; j < 8; ++j) rows[j] = reinterpret_cast<const uint32_t*>(keys[j]);
  if (dim % 2 == 0)
    for (; i + 8 <= words; i += 8) transpose8(rows, i, columns + i * kPanel);
  // What is left, and odd dims, whose rows of bf16 are not aligned to words.
  for (int64_t d = i * per_word; d < even_up(dim); ++d)
    for (int64_t j = 0; j < 8; ++j)
      reinterpret_cast<E*>(columns)[(d / per_word * kPanel + j) * per_word + d % per_word] = d < dim ? keys[j][d] : E(0);
}

// A block of keys as weight panels: 16 keys are the columns, the head dim is k. Columns past `count` are whatever key 0 is;
// their scores are masked.
template <typename T>
static void pack_keys(const T* const* keys, int64_t count, int64_t dim, char* out) {
  using E = Panel<T>;
  int64_t depth = even_up(dim), stride = depth + 32;
  E* wide = kSame<T, E> ? nullptr : static_cast<E*>(scratch(kSlotTile, size_t(8 * stride) * sizeof(E)));
  for (int64_t first = 0; first < ceil_div(count, kPanel) * kPanel; first += 8) {
    const E* rows[8];
    for (int64_t j = 0; j < 8; ++j) {
      const T* key = keys[first + j < count ? first + j : 0];
      if constexpr (kSame<T, E>) {
        rows[j] = key;
      } else {
        if constexpr (kSame<E, float>)
          widen_row(key, dim, wide + j * stride);
        else
          bf16_row(key, dim, wide + j * stride);
        rows[j] = wide + j * stride;
      }
    }
    char* panel = out + first / kPanel * kPanel * depth * int64_t(sizeof(E));
    pack_columns<E>(rows, dim, reinterpret_cast<uint32_t*>(panel) + first % kPanel);
  }
}

// VL pairs of the elements of two rows, from the first and from the last half of the vectors.
INLINE void pair_up(vpairs a, vpairs b, vu& first, vu& second) {
  vpairs low, high;
  UNROLL for (int i = 0; i < 2 * VL; ++i) low[i] = uint16_t(i / 2 + i % 2 * 2 * VL), high[i] = uint16_t(low[i] + VL);
  first = (vu)__builtin_shuffle(a, b, low), second = (vu)__builtin_shuffle(a, b, high);
}

// A block of values as weight panels: 16 elements of the value head are the columns, the keys are k. Keys outside
// [low, high), which no row sees, are zeros: their slots may hold NaN. `panel_bytes`: from one panel to the next.
template <typename T>
static void pack_values(
    const T* const* values, int64_t low, int64_t high, int64_t count, int64_t dim, int64_t panel_bytes, char* out) {
  constexpr int64_t step = kPath<T> == Path::f32 ? VL : 2 * VL;
  auto at = [=](int64_t column, int64_t line) __attribute__((always_inline)) {
    return out + column / kPanel * panel_bytes + line * 64 + column % kPanel * 4;
  };
  for (int64_t d = 0; d < dim; d += step) {
    int64_t width = min1(step, dim - d);
    // Of a row's last elements, and of keys that are not seen, a copy that ends in zeros.
    T tails[2][step];
    auto row = [&](int64_t key, T* tail) __attribute__((always_inline)) {
      bool inside = key >= low && key < high;
      if (inside && width == step) return values[key] + d;
      for (int64_t j = 0; j < step; ++j) tail[j] = inside && j < width ? values[key][d + j] : T{};
      return static_cast<const T*>(tail);
    };
    if constexpr (kPath<T> == Path::f32) {
      for (int64_t key = 0; key < even_up(count); ++key) store(reinterpret_cast<float*>(at(d, key)), load(row(key, tails[0])));
    } else {
      for (int64_t key = 0; key < count; key += 2) {
        vu first, second;
        pair_up(load_bf16s(row(key, tails[0])), load_bf16s(row(key + 1, tails[1])), first, second);
        *reinterpret_cast<vu*>(at(d, key / 2)) = first;
        if (d + VL < ceil_div(dim, kPanel) * kPanel) *reinterpret_cast<vu*>(at(d + VL, key / 2)) = second;
      }
    }
  }
}

constexpr int64_t kAmxRows = 8;  // from so many rows on AMX tiles repay being set up

// c (+)= a [rows, 2 * pairs] times `panels` weight panels. Memory is asked for `lines` of `next` with every tile. Past its last
// pair, up to 32 elements, a row of a holds finite numbers.
template <typename T>
static void product(
    const TileKernels* amx, const Operand* a, int64_t a_stride, int64_t rows, const char* w, int64_t panel_bytes,
    int64_t panels, int64_t pairs, float* c, int64_t c_stride, bool add, Ahead<T>& next, int64_t lines) {
  static constexpr Tiles<kPath<T>> tiles;
  int64_t groups = ceil_div(rows, kMaxRows);
#ifdef HAS_DOT_BF16
  if (amx && rows >= kAmxRows) {
    int64_t step = 2 * panels_at_once(kMaxRows);
    for (int64_t p = 0; p < panels; p += step) {
      next.lines(2 * groups * lines);
      amx->bf16({a, a_stride * 2, w + p * panel_bytes, panel_bytes, pairs, c + p * kPanel, c_stride, rows,
                 min1(step, panels - p), add});
    }
    return;
  }
#endif
  for (int64_t g = 0; g < groups; ++g) {
    int64_t start = group_start(rows, groups, g), size = group_start(rows, groups, g + 1) - start;
    int64_t step = panels_at_once(int(size)), p = 0;
    const Operand* ap = a + start * a_stride;
    float* cp = c + start * c_stride;
    for (; p + step <= panels; p += step) {
      next.lines(lines);
      tiles.many[size](ap, a_stride, w + p * panel_bytes, panel_bytes, pairs, cp + p * kPanel, c_stride, add);
    }
    for (; p < panels; ++p)
      tiles.one[size](ap, a_stride, w + p * panel_bytes, panel_bytes, pairs, cp + p * kPanel, c_stride, add);
  }
}

// Bytes of two k in a panel.
template <typename T>
INLINE int64_t line_bytes() {
  return kPath<T> == Path::f32 ? 128 : 64;
}

#ifdef HAS_DOT_BF16
constexpr int64_t kFewRows = 16;  // up to so many, laying keys out takes longer than adding up the lanes of direct products

// Scores of a few rows against latents and rotated keys, straight from where they are. Both are whole numbers of pairs of vectors
// long.
static void latent_scores(
    const AttentionArgs& a, const Block<uint16_t>& block, const Operand* q, int64_t q_stride, int64_t rows, int64_t count,
    float* scores, int64_t stride, Ahead<uint16_t>& next_latents, Ahead<uint16_t>& next_rotated) {
  int64_t sixteens = ceil_div(rows * count, 16);  // of the latents half is asked for here, the rest beside the values
  int64_t lines = ceil_div(next_latents.all_lines(), 2 * sixteens), rotated_lines = ceil_div(next_rotated.all_lines(), sixteens);
  auto some_rows = [&](auto size, int64_t row) __attribute__((always_inline)) {
    constexpr int R = size.value, N = 16 / R;
    const Operand* some_q = q + row * q_stride;
    for (int64_t j = 0; j < count; j += N) {
      const uint16_t *latents[N], *rotated[N];
      UNROLL for (int n = 0; n < N; ++n) {
        latents[n] = block.first[min1(j + n, count - 1)];
        rotated[n] = block.second[min1(j + n, count - 1)];
      }
      next_latents.lines(lines);
      next_rotated.lines(rotated_lines);
      vf sums[16] = {};
      add_products<uint16_t, R>(sums, latents, some_q, q_stride, a.k.dim);
      add_products<uint16_t, R>(sums, rotated, some_q + a.k.dim, q_stride, a.v.dim);
      vf all = sum_each(sums);
      UNROLL for (int r = 0; r < R; ++r)
        __builtin_memcpy(scores + (row + r) * stride + j, reinterpret_cast<const float*>(&all) + r * N, N * sizeof(float));
    }
  };
  by_rows(rows, some_rows);
}
#endif

// scores = queries times keys. A latent key is in two pieces, the latent and the rotated key, with panels each; where they are
// scaled apart, the latter's scores go to `rotated`.
template <typename T>
static void tiled_scores(
    const AttentionArgs& a, const Block<T>& block, const Scales* scales, const Operand* q, int64_t q_stride, int64_t rows,
    int64_t count, float* scores, float* rotated, int64_t stride, Ahead<T>& next, int64_t lines, Ahead<T>& next_rotated,
    int64_t rotated_lines) {
#ifdef HAS_DOT_BF16
  if constexpr (kSame<T, uint16_t>) {
    if (a.latent && !a.tiles && rows <= kFewRows && a.k.dim % (2 * VL) == 0 && a.v.dim % (2 * VL) == 0)
      return latent_scores(a, block, q, q_stride, rows, count, scores, stride, next, next_rotated);
  }
#endif
  int64_t depth = even_up(a.k.dim), panels = ceil_div(count, kPanel), bytes = depth / 2 * line_bytes<T>();
  int64_t rope_bytes = a.latent ? even_up(a.v.dim) / 2 * line_bytes<T>() : 0;
  char* packed = static_cast<char*>(scratch(kSlotKeys, size_t(kKeys / kPanel * (bytes + rope_bytes))));
  pack_keys<T>(block.first, count, a.k.dim, packed);
  product<T>(a.tiles, q, q_stride, rows, packed, bytes, panels, depth / 2, scores, stride, false, next, lines);
  if (!a.latent) return;
  packed += kKeys / kPanel * bytes;
  pack_keys<T>(block.second, count, a.v.dim, packed);
  float* to = scales ? rotated : scores;
  product<T>(
      a.tiles, q + depth, q_stride, rows, packed, rope_bytes, panels, even_up(a.v.dim) / 2, to, stride, !scales, next_rotated,
      rotated_lines);
}

template <typename T>
static void tiled_block(
    const AttentionArgs& a, const AttentionTask& t, TaskState& state, const Block<T>& block, int64_t begin, int64_t count,
    int64_t found) {
  Softmax& s = state.softmax;
  int64_t group = a.group(), v_dim = a.v_head_dim(), v_panels = s.stride / kPanel;
  // Queries that see nothing of this block are left out at both ends of the tile.
  int64_t from = t.queries, to = 0, low = count, high = 0;
  for (int64_t i = 0; i < t.queries; ++i) {
    Seen seen = seen_by(a, t, i);
    if (seen.first >= begin + count || seen.last <= begin) continue;
    from = min1(from, i), to = i + 1;
    low = min1(low, max1(int64_t(0), seen.first - begin));
    high = max1(high, min1(count, seen.last - begin));
  }
  if (from >= to) return;
  int64_t row0 = from * group, rows = (to - from) * group, q_stride = state.q_stride;
  const Operand* q = state.q + row0 * q_stride;
  Scales own;
  if (a.scaled()) {
    find_scales(a.k, a.num_kv_heads, t.head, block.tokens, count, own.first);
    find_scales(a.v, a.num_kv_heads, t.head, block.tokens, count, own.second);
  }
  const Scales* scales = a.scaled() ? &own : nullptr;
  // One vector more than the keys, so that rows do not share their L1 sets.
  int64_t stride = kKeys + 16, weight_stride = kKeys + 32;
  size_t row_bytes = size_t(2 * stride) * sizeof(float) + size_t(weight_stride) * sizeof(Operand);
  float* scores = static_cast<float*>(scratch(kSlotScores, size_t(rows) * row_bytes));
  float* rotated = scores + rows * stride;
  Operand* weights = reinterpret_cast<Operand*>(rotated + rows * stride);
  // So many lines a tile that the next block has been asked for when this one is done.
  int64_t groups = ceil_div(rows, kMaxRows), step = panels_at_once(int(ceil_div(rows, groups)));
  int64_t score_tiles = groups * max1(int64_t(1), kKeys / kPanel / step), value_tiles = groups * max1(int64_t(1), v_panels / step);
  Ahead<T> next_first{block.first + kKeys, found - kKeys, a.k.dim}, next_second{block.second + kKeys, found - kKeys, a.v.dim};
  Ahead<T>& next_values = a.latent ? next_first : next_second;
  // Latents are asked for in halves: both products take about as long.
  int64_t parts = a.latent ? 2 : 1, lines = ceil_div(next_first.all_lines(), parts * score_tiles);
  int64_t second_lines = ceil_div(next_second.all_lines(), score_tiles);  // of rotated keys
  int64_t value_lines = ceil_div(next_values.all_lines(), parts * value_tiles);

  tiled_scores<T>(a, block, scales, q, q_stride, rows, count, scores, rotated, stride, next_first, lines,
                  next_second, second_lines);
  const float* key_scales = scales ? scales->first : nullptr;
  const float* value_scales = !scales ? nullptr : a.latent ? scales->first : scales->second;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    for (int64_t j = ceil_div(count, kPanel) * kPanel; j < kKeys; ++j) row[j] = 0.0f;
    if (a.latent && scales) {
      const float* other = rotated + r * stride;
      for (int64_t j = 0; j < ceil_div(count, kPanel) * kPanel; j += VL)
        store(row + j, load(row + j) * load(scales->first + j) + load(other + j) * load(scales->second + j));
      key_scales = nullptr;
    }
    update_row(a, s, row0 + r, row, weights + r * weight_stride, key_scales, value_scales, begin, count,
               seen_by(a, t, (row0 + r) / group));
  }
  int64_t panel_bytes = kKeys / 2 * line_bytes<T>();
  char* packed = static_cast<char*>(scratch(kSlotValues, size_t(v_panels * panel_bytes)));
  pack_values<T>(a.latent ? block.first : block.second, low, high, count, v_dim, panel_bytes, packed);
  float* acc = s.acc + row0 * s.stride;
  product<T>(
      a.tiles, weights, weight_stride, rows, packed, panel_bytes, v_panels, ceil_div(count, 2), acc, s.stride, true, next_values,
      value_lines);
}
