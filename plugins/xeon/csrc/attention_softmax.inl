// What all ways through attention share: which keys a query sees, the blocks of keys they visit, and the running softmax.

constexpr int64_t kKeys = 64;  // keys a block holds
constexpr float kNegInf = -__builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;

#ifdef HAS_DOT_BF16
using Operand = uint16_t;  // what queries and weights are multiplied as
template <typename T>
constexpr Path kPath = Path::dot_bf16;
#else
using Operand = float;
template <typename T>
constexpr Path kPath = Path::f32;
template <>
constexpr Path kPath<uint16_t> = Path::bf16;
#endif

struct AttentionTask {
  int32_t req;
  int32_t head, heads;         // KV heads [head, head + heads)
  int32_t query, queries;      // of the req's new tokens: [query, query + queries)
  int32_t key_begin, key_end;  // positions this task visits
  int32_t partial;             // first row of its partial results, -1: it writes the output itself
  int32_t parts;               // on the first of a range's parts, if they are to be merged: how many; else 0
  const int32_t* tokens;       // of keys that reqs share: whose queries they are, [queries]; else null

  INLINE_MEMBER int64_t token(const AttentionArgs& a, int64_t i) const { return tokens ? tokens[i] : a.cu_extend[req] + query + i; }
};

// Tasks in the order they are taken. With `tasks` null they are only counted.
struct TaskList {
  AttentionTask* tasks;
  int64_t count, partial_rows;  // rows of partial results

  INLINE_MEMBER void add(const AttentionTask& task) {
    if (tasks) tasks[count] = task;
    ++count;
  }
};

// The running softmax of a task's rows. Tops are logarithms to base 2.
struct Softmax {
  int64_t stride;
  float* acc;  // [rows, stride]
  float *top, *total;
};

// What a task works on, in this thread's memory: [heads][rows] of each, rows = queries x group.
struct TaskState {
  Operand* q;
  int64_t q_stride, rows;
  Softmax softmax;
};

INLINE int64_t keys_of(const AttentionArgs& a, int64_t req) {
  return a.cu_keys ? a.cu_keys[req + 1] - a.cu_keys[req] : a.seq_lens[req];
}

// Position of the req's first new token.
INLINE int64_t prefix_of(const AttentionArgs& a, int64_t req) {
  return a.cu_keys ? keys_of(a, req) - (a.cu_extend[req + 1] - a.cu_extend[req]) : a.prefix_lens[req];
}

// The keys that a query sees: positions [first, last), and of those from `prefix` on only what is on its path in a tree.
struct Seen {
  int64_t first, last;
  const int32_t* path;   // bits over the req's new tokens; null: no tree
  int64_t prefix, drop;  // so many tokens from the root of the path are out of the window

  INLINE_MEMBER bool on_path(int64_t token) const {
    if (!(uint32_t(path[token / 32]) >> (token % 32) & 1)) return false;
    int64_t depth = 0;
    for (int64_t word = 0; drop && word <= token / 32; ++word)
      depth += __builtin_popcount(uint32_t(path[word]) & (word < token / 32 ? ~0u : (1u << (token % 32)) - 1));
    return depth >= drop;
  }
};

INLINE Seen seen_by(const AttentionArgs& a, int64_t req, int64_t query) {
  int64_t keys = keys_of(a, req), prefix = prefix_of(a, req), position = prefix + query;
  if (!a.causal) return {0, keys, nullptr, 0, 0};
  Seen seen{0, max1(int64_t(0), min1(position + 1, keys)), nullptr, prefix, 0};
  if (a.window) seen.first = max1(int64_t(0), position + 1 - a.window);
  if (!a.tree) return seen;
  seen.path = a.tree + (a.cu_extend[req] + query) * a.tree_words;
  if (a.window) {  // counts by depth, and any of the new tokens may be the root of the path
    int64_t length = 0;
    for (int64_t word = 0; word < a.tree_words; ++word) length += __builtin_popcount(uint32_t(seen.path[word]));
    seen.first = max1(int64_t(0), min1(prefix, prefix + length - a.window));
    seen.drop = max1(int64_t(0), length - a.window);
  }
  return seen;
}

// What query i of a task sees. Shared keys are before all new tokens, and there are none under a window.
INLINE Seen seen_by(const AttentionArgs& a, const AttentionTask& t, int64_t i) {
  return t.tokens ? Seen{0, t.key_end, nullptr, 0, 0} : seen_by(a, t.req, t.query + i);
}

// Where each key and value begins, of the task's first KV head; of latents, each latent and rotated key. A block's, and after them
// those of the next block, to be asked for ahead of their time.
template <typename T>
struct Block {
  int64_t tokens[2 * kKeys];  // rows of the stores
  const T *first[2 * kKeys], *second[2 * kKeys];
};

template <typename T>
INLINE void find_keys(const AttentionArgs& a, const AttentionTask& t, int64_t begin, int64_t count, Block<T>& block) {
  if (a.page_table) {
    const int32_t* pages = a.page_table + t.req * a.num_columns;
    int64_t column = begin / a.page_size, offset = begin % a.page_size;
    for (int64_t j = 0; j < count; ++j) {
      block.tokens[j] = int64_t(pages[column]) * a.page_size + offset;
      if (++offset == a.page_size) offset = 0, ++column;
    }
  } else {
    for (int64_t j = 0; j < count; ++j) block.tokens[j] = a.cu_keys[t.req] + begin + j;
  }
  const T* first = static_cast<const T*>(a.k.data) + t.head * a.k.dim;
  const T* second = static_cast<const T*>(a.v.data) + t.head * a.v.dim;
  for (int64_t j = 0; j < count; ++j) {
    block.first[j] = first + block.tokens[j] * a.k.row;
    block.second[j] = second + block.tokens[j] * a.v.row;
  }
}

// What the codes of a block stand for, of one KV head. Zeros after the last key: a stale slot's may be NaN.
struct Scales {
  float first[kKeys], second[kKeys];
};

INLINE void find_scales(const KvStore& store, int64_t heads, int64_t head, const int64_t* tokens, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j)
    out[j] = store.token_scales ? store.token_scales[tokens[j] * heads + head] : store.head_scales[head];
  for (int64_t j = count; j < kKeys; ++j) out[j] = 0.0f;
}

// Asks for the next block's rows, a cache line at a time and in the order of addresses, which the rows of one head, being far
// apart, are not: the hardware then sees a stream and runs ahead of it.
template <typename T>
struct Ahead {
  const T* const* rows;  // of the first KV head of the task; those of its other heads follow each
  int64_t count, width;  // rows, and elements to fetch of each
  int64_t row = 0, at = 0;

  INLINE_MEMBER int64_t all_lines() const { return max1(int64_t(0), count) * ceil_div(width * int64_t(sizeof(T)), 64); }
  INLINE_MEMBER void line() {
    if (row >= count) return;
    __builtin_prefetch(rows[row] + at, 0, 2);  // into L2: a block of all heads is more than L1 holds
    at += 64 / int64_t(sizeof(T));
    if (at >= width) at = 0, ++row;
  }
  INLINE_MEMBER void lines(int64_t n) {
    for (int64_t i = 0; i < n; ++i) line();
  }
};

// 2^x for x <= 0 to about 1e-7 of it; 0 below -126, and so for -inf. A NaN stays one.
INLINE vf exp2(vf x) {
  vf magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: the sum is rounded to a whole number, and its low bits are an exponent
  vf shifted = x + magic, r = x - (shifted - magic);
  vf p = splat(1.326472721e-3f);
  p = p * r + 9.671512812e-3f;
  p = p * r + 5.550733745e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
  vf y = p * (vf)((vi)shifted << 23);
  return x < -126.0f ? (vf){} : y;
}

// Scores of one row against a block of keys become weights, and the row's earlier sums are scaled to the new top. Key j of the
// block is at position begin + j. key_scales and value_scales: of the block's codes, or null. weights may be scores.
INLINE void update_row(
    const AttentionArgs& a, Softmax& s, int64_t row, float* scores, Operand* weights, const float* key_scales,
    const float* value_scales, int64_t begin, int64_t count, const Seen& seen) {
  int64_t low = min1(max1(seen.first - begin, int64_t(0)), kKeys), high = max1(min1(seen.last - begin, count), int64_t(0));
  float factor = a.scale * kLog2e;
  if (key_scales)
    for (int64_t j = 0; j < kKeys; j += VL) store(scores + j, load(scores + j) * load(key_scales + j));
  if (a.soft_cap != 0.0f) {
    for (int64_t j = 0; j < kKeys; j += VL) store(scores + j, tanh(load(scores + j) * (a.scale / a.soft_cap)));
    factor = a.soft_cap * kLog2e;
  }
  // Scores of keys outside the range may come from stale slots, NaN included: they are overwritten, not multiplied.
  for (int64_t j = 0; j < low; ++j) scores[j] = kNegInf;
  for (int64_t j = high; j < kKeys; ++j) scores[j] = kNegInf;
  if (seen.path) {
    for (int64_t j = max1(low, seen.prefix - begin); j < high; ++j)
      if (!seen.on_path(begin + j - seen.prefix)) scores[j] = kNegInf;
  }
  vf best = splat(kNegInf);
  for (int64_t j = 0; j < kKeys; j += VL) best = max(load(scores + j) * factor, best);
  float top = max1(s.top[row], max_lane(best));
  if (top == kNegInf) {
    for (int64_t j = 0; j < kKeys; ++j) weights[j] = 0;
    return;
  }
  vf sums{};
  for (int64_t j = 0; j < kKeys; j += VL) {
    vf weight = exp2(load(scores + j) * factor - top);
    sums += weight;
    if (value_scales) weight *= load(value_scales + j);
    store_weights(weights + j, weight);
  }
  float decay = 1.0f;
  if (top != s.top[row]) {
    decay = exp2(splat(s.top[row] - top))[0];
    float* acc = s.acc + row * s.stride;
    for (int64_t i = 0; i < s.stride; i += VL) store(acc + i, load(acc + i) * decay);
    s.top[row] = top;
  }
  s.total[row] = s.total[row] * decay + sum(sums);
}
