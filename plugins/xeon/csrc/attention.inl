// attn.paged after the write, attn.mla_paged and attn.ragged: every new token over its req's keys. Work is cut by (req, tile of
// queries, KV heads, part of the keys). The rows of a tile are its queries times the heads that share a KV head, so each key is
// read once for all of them: with latents, once for all heads. Softmax is online in float32. Two ways to visit a block of keys:
//   direct  few rows (decode): dot products straight from the cache, all KV heads of a few keys before the next keys, so that
//           pages are read from end to end;
//   tiled   many rows (extend, latents): keys are transposed into panels and both products run on the GEMM tiles.
// Where a range of keys is cut depends on the req alone, so its result does not depend on its neighbours; unless a.sharing says
// which keys it shares with them (attention_shared.inl).

constexpr int64_t kDecodePart = 512;   // keys a task of one new token visits at most, and one that goes the direct way
constexpr int64_t kExtendPart = 4096;  // keys another task visits at most ...
constexpr int64_t kPartTiles = 8;      // ... if its req has no more tiles than this: with more there is work to go round

struct AttentionWork {
  const AttentionArgs* args;
  const AttentionTask* tasks;
  Sharing sharing;
  float* partials;  // rows of sums, then top and total
  int64_t partial_stride;
};

INLINE void load_query(const Rows& from, int64_t at, int64_t dim, Operand* out) {
#ifdef HAS_DOT_BF16
  __builtin_memcpy(out, static_cast<const uint16_t*>(from.data) + at, size_t(dim) * 2);
#else
  if (from.dtype == DType::bf16)
    widen_row(static_cast<const uint16_t*>(from.data) + at, dim, out);
  else
    widen_row(static_cast<const float*>(from.data) + at, dim, out);
#endif
}

// The queries of one KV head in the order that the keys are read. A latent's rotated part starts at an even place.
template <typename T>
static void load_queries(const AttentionArgs& a, const AttentionTask& t, int64_t head, bool direct, Operand* out, int64_t stride) {
  int64_t group = a.group(), dim = a.k.dim, rope = a.v.dim;
  for (int64_t i = 0; i < t.queries * group; ++i) {
    int64_t token = t.token(a, i / group), column = head * group + i % group;
    Operand* row = out + i * stride;
    for (int64_t d = dim; d < stride; ++d) row[d] = 0;
    load_query(a.q, token * a.q.stride + column * dim, dim, row);
    if (a.latent) load_query(a.q_rope, token * a.q_rope.stride + column * rope, rope, row + even_up(dim));
    if (direct && query_order<T>(1) != 1) {
      for (int64_t d = 0; d < dim; d += 2 * VL) {
        Operand pair[2 * VL];
        for (int64_t j = 0; j < 2 * VL; ++j) pair[query_order<T>(j)] = row[d + j];
        for (int64_t j = 0; j < 2 * VL; ++j) row[d + j] = pair[j];
      }
    }
  }
}

INLINE void write_row(const AttentionArgs& a, int64_t token, int64_t head, float* acc, float top, float total) {
  float scale = total > 0.0f ? 1.0f / total : 0.0f;
  int64_t dim = a.v_head_dim(), at = token * a.out.stride + head * dim;
  for (int64_t d = 0; d < dim; d += VL) store(acc + d, load(acc + d) * scale);
  if (a.out.dtype == DType::bf16)
    narrow_row(acc, dim, static_cast<uint16_t*>(a.out.data) + at);
  else
    narrow_row(acc, dim, static_cast<float*>(a.out.data) + at);
  if (a.lse) a.lse[token * a.num_heads + head] = total > 0.0f ? __builtin_logf(total) + top / kLog2e : kNegInf;
}

// Sums of the direct way in the order of the value's elements.
template <typename T>
INLINE void restore_order(float* acc, int64_t dim) {
  if (sum_order<T>(1) == 1 && sum_order<T>(4) == 4) return;
  for (int64_t d = 0; d < dim; d += 2 * VL) {
    float pair[2 * VL];
    for (int64_t j = 0; j < 2 * VL; ++j) pair[j] = acc[d + sum_order<T>(j)];
    for (int64_t j = 0; j < 2 * VL; ++j) acc[d + j] = pair[j];
  }
}

template <typename T>
INLINE TaskState begin_task(const AttentionArgs& a, const AttentionTask& t, bool direct) {
  int64_t group = a.group(), rows = t.queries * group, all_rows = t.heads * rows;
  int64_t stride = ceil_div(a.v_head_dim(), kPanel) * kPanel;
  int64_t q_stride = ceil_div(even_up(a.k.dim) + (a.latent ? a.v.dim : 0), 32) * 32 + 32;
  size_t row_bytes = size_t(stride + 2) * sizeof(float) + size_t(q_stride) * sizeof(Operand);
  auto* acc = static_cast<float*>(scratch(kSlotState, size_t(all_rows) * row_bytes));
  float *top = acc + all_rows * stride, *total = top + all_rows;
  TaskState state{reinterpret_cast<Operand*>(total + all_rows), q_stride, rows, {stride, acc, top, total}};
  for (int64_t i = 0; i < all_rows * stride; i += VL) store(acc + i, vf{});
  // The sink is a key with no value; of several parts of a range only the first counts it.
  bool sinks = a.sinks && (t.partial < 0 || t.parts > 0);
  for (int64_t h = 0; h < t.heads; ++h) {
    load_queries<T>(a, t, t.head + h, direct, state.q + h * rows * q_stride, q_stride);
    for (int64_t r = 0; r < rows; ++r) {
      top[h * rows + r] = sinks ? a.sinks[(t.head + h) * group + r % group] * kLog2e : kNegInf;
      total[h * rows + r] = sinks ? 1.0f : 0.0f;
    }
  }
  return state;
}

template <typename T>
static void attention_task(const AttentionWork& work, const AttentionTask& t) {
  const AttentionArgs& a = *work.args;
  int64_t group = a.group(), rows = t.queries * group, all_rows = t.heads * rows;
  bool direct = is_direct(a, rows);
  TaskState state = begin_task<T>(a, t, direct);

  Block<T> block;
  for (int64_t begin = t.key_begin; begin < t.key_end; begin += kKeys) {
    int64_t found = min1(2 * kKeys, t.key_end - begin), count = min1(kKeys, found);
    find_keys<T>(a, t, begin, found, block);
    if (direct)
      direct_block<T>(a, t, state, block, begin, count, found);
    else
      tiled_block<T>(a, t, state, block, begin, count, found);
  }

  for (int64_t i = 0; i < all_rows; ++i) {
    const Softmax& s = state.softmax;
    float* acc = s.acc + i * s.stride;
    if (direct) restore_order<T>(acc, a.v.dim);
    if (t.partial < 0) {
      int64_t r = i % rows;
      write_row(a, t.token(a, r / group), (t.head + i / rows) * group + r % group, acc, s.top[i], s.total[i]);
    } else {
      float* part = work.partials + (t.partial + i) * work.partial_stride;
      __builtin_memcpy(part, acc, size_t(s.stride) * sizeof(float));
      part[s.stride] = s.top[i], part[s.stride + 1] = s.total[i];
    }
  }
}

static void attention_one(const void* opaque, int64_t index) {
  const AttentionWork& work = *static_cast<const AttentionWork*>(opaque);
  const AttentionTask& t = work.tasks[index];
  switch (work.args->kv_dtype) {
    case KvDType::bf16: return attention_task<uint16_t>(work, t);
    case KvDType::fp8: return attention_task<Fp8>(work, t);
    case KvDType::int8: return attention_task<int8_t>(work, t);
#ifndef HAS_DOT_BF16
    case KvDType::f32: return attention_task<float>(work, t);
    case KvDType::f16: return attention_task<Half>(work, t);
#else
    default: return;  // library.cpp has these elsewhere
#endif
  }
}

constexpr int64_t kMergeWays = 4;  // tasks that share the rows of one range

// Sums the parts of one range, and of the runs of shared keys before it, into the output. The parts of a range follow each other,
// and so do their rows of partials.
static void merge_parts(const void* opaque, int64_t index) {
  const AttentionWork& work = *static_cast<const AttentionWork*>(opaque);
  const AttentionArgs& a = *work.args;
  const AttentionTask& t = work.tasks[index / kMergeWays];
  if (t.parts == 0) return;
  const Sharing& shared = work.sharing;
  int64_t group = a.group(), rows = t.queries * group, all_rows = t.heads * rows, stride = work.partial_stride - kPanel;
  float* acc = static_cast<float*>(scratch(kSlotState, size_t(stride) * sizeof(float)));
  for (int64_t r = index % kMergeWays; r < all_rows; r += kMergeWays) {
    int64_t head = t.head + r / rows, query = r % rows / group, column = r % group;
    auto each_part = [&](auto visit) __attribute__((always_inline)) {
      for (int64_t i = 0; i < t.parts; ++i) visit(work.partials + (t.partial + i * all_rows + r) * work.partial_stride);
      for (int32_t last = shared.last_run_of(t.req); last >= 0; last = shared.runs[last].above) {
        const SharedRun& run = shared.runs[last];
        int64_t run_rows = (run.last - run.first) * group;
        int64_t row = run.partial + head * run_rows + (shared.place[t.req] + t.query + query - run.first) * group + column;
        for (int64_t i = 0; i < run.parts; ++i, row += a.num_kv_heads * run_rows) visit(work.partials + row * work.partial_stride);
      }
    };
    float top = kNegInf, total = 0.0f;
    each_part([&](const float* part) __attribute__((always_inline)) { top = max1(top, part[stride]); });
    for (int64_t d = 0; d < stride; d += VL) store(acc + d, vf{});
    auto add = [&](const float* part) __attribute__((always_inline)) {
      float scale = exp2(splat(part[stride] - top))[0];
      total += part[stride + 1] * scale;
      for (int64_t d = 0; d < stride; d += VL) store(acc + d, load(acc + d) + load(part + d) * scale);
    };
    if (top != kNegInf) each_part(add);
    write_row(a, t.token(a, query), head * group + column, acc, top, total);
  }
}

// Tasks over the keys that a req visits alone: of each req the last tile of queries, which sees most, first.
static void cut_reqs(const AttentionArgs& a, const Sharing& shared, int64_t direct_heads, TaskList& list) {
  int64_t group = a.group(), length = max1(int64_t(1), kTileRows / group);
  for (int64_t req = 0; req < a.num_reqs; ++req) {
    int64_t extend = a.cu_extend[req + 1] - a.cu_extend[req], tiles = ceil_div(extend, length);
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      int64_t query = tile * length, queries = min1(length, extend - query);
      Seen seen = seen_by(a, req, query);
      int64_t begin = seen.first, end = seen_by(a, req, query + queries - 1).last;
      for (int64_t i = 1; seen.path && i < queries; ++i) begin = min1(begin, seen_by(a, req, query + i).first);
      begin = min1(max1(begin, shared.own_keys_begin(req)), end);
      bool direct = is_direct(a, queries * group);
      int64_t keys = direct || extend == 1 ? kDecodePart : tiles <= kPartTiles ? kExtendPart : max1(int64_t(1), end - begin);
      int64_t heads = direct ? direct_heads : 1, parts = max1(int64_t(1), ceil_div(end - begin, keys));
      bool merged = parts > 1 || shared.last_run_of(req) >= 0;
      for (int64_t head = 0; head < a.num_kv_heads; head += heads) {
        int64_t some = min1(heads, a.num_kv_heads - head);
        for (int64_t i = 0; i < parts; ++i) {
          list.add({int32_t(req), int32_t(head), int32_t(some), int32_t(query), int32_t(queries), int32_t(begin + i * keys),
                    int32_t(min1(end, begin + (i + 1) * keys)), merged ? int32_t(list.partial_rows) : -1,
                    merged && i == 0 ? int32_t(parts) : 0, nullptr});
          if (merged) list.partial_rows += some * queries * group;
        }
      }
    }
  }
}

static void attention(const AttentionArgs& a) {
  // All KV heads in one task read pages from end to end, and long parts of shared keys leave little to merge; fewer and shorter
  // where there would be too few tasks to go round.
  Sharing shared = find_shared(a);
  int64_t heads = a.num_kv_heads, part = kExtendPart, wanted = num_threads() > 1 ? 4 * num_threads() : 0;
  auto cut = [&](AttentionTask* tasks, bool all) {
    TaskList list{tasks, 0, 0};
    cut_runs(a, shared, heads, part, list);
    if (all) cut_reqs(a, shared, heads, list);
    return list;
  };
  while (shared.num_runs && part > kLeastPart && cut(nullptr, false).count < wanted) part /= 2;
  TaskList list = cut(nullptr, true);
  while (heads > 1 && list.count < wanted) {
    heads = ceil_div(heads, 2);
    list = cut(nullptr, true);
  }
  list = cut(static_cast<AttentionTask*>(scratch(kSlotPartials, size_t(list.count) * sizeof(AttentionTask))), true);
  AttentionWork work{&a, list.tasks, shared, nullptr, ceil_div(a.v_head_dim(), kPanel) * kPanel + kPanel};
  if (list.partial_rows)
    work.partials = static_cast<float*>(scratch(kSlotActivations, size_t(list.partial_rows * work.partial_stride) * sizeof(float)));
  run_tasks(list.count, attention_one, &work);
  if (list.partial_rows) run_tasks(list.count * kMergeWays, merge_parts, &work);
}
