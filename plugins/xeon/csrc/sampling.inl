// sample.sample, a row a task, without sorting the vocabulary. One sweep over the logits notes the largest of every 64, and where
// the whole mass is needed, the mass of every 1024 while they are in L1. What top-k or top-p may keep is halved by value until few enough are
// left to sort; the draw then goes over the logits again, past runs whose largest is too small. Sums of blocks are in float32, all
// others in double precision.

constexpr int64_t kRun = 64;      // tokens that share a maximum
constexpr int64_t kBlock = 1024;  // tokens that share a sum
constexpr int64_t kSorted = 256;  // candidates up to which all are sorted
constexpr float kNoMass = -87.3f;  // `exp` is 0 below it
constexpr int64_t kAhead = 4096;   // bytes that are fetched ahead of a sweep

template <typename T>
struct LogitRow {
  const T* data;
  int64_t width, whole;  // whole: of full vectors
  float inverse;  // of the temperature
  T rest[VL];  // what follows them, then -inf
};

template <typename T>
INLINE vf raw(const LogitRow<T>& row, int64_t i) {
  return load(i < row.whole ? row.data + i : row.rest);
}

template <typename T>
INLINE vf scaled(const LogitRow<T>& row, int64_t i) {
  return raw(row, i) * row.inverse;
}

// What one sweep learns, in scaled logits.
struct Sweep {
  float top;
  float* run_max;    // -inf where all are NaN, and once more after the last
  float* block_top;  // where masses are summed
  double* masses;  // of each block, relative to `top`
  double total;
};

// The tokens that are kept: above `last`, or equal to it with an id up to `last_id`, and of a mass of at least `min_mass`.
struct Kept {
  float last, top, min_mass;
  int64_t last_id;
};

// Candidates, largest first, and how many come before them.
struct Ranked {
  float *values, *masses;
  int64_t count, above;
  double mass_above;
};

// Where top-k and top-p end: of those equal to `last` the first `room` stay; `split` if there are more. `mass` of all that stay.
struct Cut {
  float last;
  int64_t room;
  bool split;
  double mass;
};

struct SampleSpace {
  Sweep sweep;
  float *values, *sorted, *sorted_masses;
};

INLINE uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// `uniform` of ops/sampling.py.
INLINE float uniform(int32_t seed, int32_t position) {
  uint32_t bits = mix(mix(uint32_t(seed) + 0x9e3779b9u) ^ uint32_t(position) * 0x27d4eb2fu);
  return float(bits >> 8) * 0x1p-24f;
}

// Writes the lanes of x in [low, high) side by side, and anything up to a vector's end. -> how many.
INLINE int64_t store_between(float* out, vf x, float low, float high) {
#if VL == 16 && !defined(EMULATE_AVX512)
  __mmask16 in = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(low), _CMP_GE_OQ);
  in = _mm512_mask_cmp_ps_mask(in, (__m512)x, (__m512)splat(high), _CMP_LT_OQ);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(in, (__m512)x));
  return __builtin_popcount(in);
#else
  float lanes[VL];
  store(lanes, x);
  int64_t count = 0;
  for (int i = 0; i < VL; ++i) {
    out[count] = lanes[i];
    count += lanes[i] >= low && lanes[i] < high;
  }
  return count;
#endif
}

INLINE int64_t sum_lanes(vi x) {
  int64_t total = 0;
  UNROLL for (int i = 0; i < VL; ++i) total += x[i];
  return total;
}

INLINE float mass_of(float scaled, float top) { return exp(splat(scaled - top))[0]; }

// The maximum of each run, and of all: scaling keeps the order, so only maxima are scaled.
template <typename T>
static void sweep_maxima(const LogitRow<T>& row, Sweep& sweep, int64_t first, int64_t end, float& top) {
  for (; first < end; first += kRun) {
    vf most = splat(-__builtin_inff());
    for (int64_t i = first; i < min1(end, first + kRun); i += VL) {
      __builtin_prefetch(row.data + i + kAhead / int64_t(sizeof(T)));
      most = max(raw(row, i), most);
    }
    float run = max_lane(most) * row.inverse;
    sweep.run_max[first / kRun] = run, top = max1(run, top);
  }
}

// A block's mass is first summed relative to its own maximum, as that of all is not known yet.
template <typename T>
static void sweep_logits(const LogitRow<T>& row, bool with_masses, Sweep& sweep) {
  sweep.top = -__builtin_inff(), sweep.total = 0;
  if (!with_masses) return sweep_maxima(row, sweep, 0, row.width, sweep.top);
  for (int64_t first = 0, b = 0; first < row.width; first += kBlock, ++b) {
    int64_t end = min1(row.width, first + kBlock);
    float& top = sweep.block_top[b] = -__builtin_inff();
    sweep_maxima(row, sweep, first, end, top);
    sweep.top = max1(top, sweep.top);
    vf sums{};
    if (top > -__builtin_inff())
      for (int64_t i = first; i < end; i += VL) sums += exp(scaled(row, i) - splat(top));
    sweep.masses[b] = sum(sums);
  }
  for (int64_t b = 0; b < ceil_div(row.width, kBlock); ++b)
    sweep.total += sweep.masses[b] *= mass_of(sweep.block_top[b], sweep.top);
}

// Something that `k` of x[0, count) reach, near the k-th largest; `low` where fewer reach that. x is followed by a vector of -inf.
static float reached_by(const float* x, int64_t count, int64_t k, float low, float high) {
  for (int step = 0; step < 20; ++step) {
    float middle = low + 0.5f * (high - low);
    vi reached{};
    for (int64_t i = 0; i < count; i += VL) reached -= load(x + i) >= splat(middle);
    int64_t number = sum_lanes(reached);
    (number >= k ? low : high) = middle;
    if (number >= k && number <= k + k / 8) break;
  }
  return low;
}

// Below it no token is kept whatever is summed: by top-k, by top-p, and by min-p where that changes no sum.
static float lowest_kept(const Sweep& sweep, int64_t width, int64_t top_k, float top_p, float min_p) {
  float lowest = sweep.top + kNoMass;
  int64_t runs = ceil_div(width, kRun);
  if (top_k <= runs) lowest = reached_by(sweep.run_max, runs, top_k, lowest, sweep.top);  // as many runs have a token there
  if (top_k >= width && top_p < 1.0f) {
    // Tokens with less mass than this have half of what top-p cuts off, all together.
    float mass = 0.5f * (1.0f - top_p) * float(sweep.total) / float(width);
    if (mass > 0.0f) lowest = max1(lowest, sweep.top + __builtin_logf(mass));
  }
  if (min_p > 0.0f && (top_k >= width || top_p >= 1.0f)) lowest = max1(lowest, sweep.top + __builtin_logf(min_p) - 1e-3f);
  return min1(lowest, sweep.top);
}

// The scaled logits from `lowest` on, side by side. -> how many.
template <typename T>
static int64_t collect(const LogitRow<T>& row, const Sweep& sweep, float lowest, float* out) {
  int64_t count = 0;
  for (int64_t first = 0; first < row.width; first += kRun) {
    if (!(sweep.run_max[first / kRun] >= lowest)) continue;
    for (int64_t i = first; i < min1(row.width, first + kRun); i += VL)
      count += store_between(out + count, scaled(row, i), lowest, __builtin_inff());
  }
  return count;
}

// Halves the candidates by value, `low` to `top`, until few are left around the place where `most` tokens or `enough` mass are reached.
static Ranked rank_around(const SampleSpace& space, int64_t count, float low, int64_t most, float enough) {
  float top = space.sweep.top, high = __builtin_inff();
  const float* from = space.values;
  Ranked r{space.sorted, space.sorted_masses, count, 0, 0};
  while (r.count > kSorted) {
    float pivot = low + 0.5f * (min1(high, top) - low);
    if (!(pivot > low && pivot < high)) break;  // all that are left are equal
    int64_t number = 0;
    double mass = 0;
    for (int64_t first = 0; first < r.count; first += kBlock) {
      vf sums{};
      vi numbers{};
      for (int64_t i = first; i < min1(r.count, first + kBlock); i += VL) {
        vf x = load(from + i);
        vi in = x >= splat(pivot);
        sums += in ? exp(x - splat(top)) : (vf){};
        numbers -= in;
      }
      mass += sum(sums), number += sum_lanes(numbers);
    }
    if (r.above + number >= most || r.mass_above + mass >= enough)
      low = pivot;
    else
      high = pivot, r.above += number, r.mass_above += mass;
    int64_t left = 0;
    for (int64_t i = 0; i < r.count; i += VL) left += store_between(r.values + left, load(from + i), low, high);
    store(r.values + left, splat(-__builtin_inff()));
    r.count = left, from = r.values;
  }
  if (from == space.values) __builtin_memcpy(r.values, from, size_t(count) * sizeof(float));
  sort_descending(r.values, r.count);
  for (int64_t i = 0; i < r.count; i += VL) store(r.masses + i, exp(load(r.values + i) - splat(top)));
  return r;
}

// Ends after `most` tokens, or before the token that has `enough` mass before it, but not before the first.
static Cut cut_off(const Ranked& r, int64_t most, float enough) {
  Cut cut{r.values[0], 0, true, r.mass_above};
  for (int64_t i = 0; i < r.count; ++i) {
    double mass = cut.mass + r.masses[i];
    bool first = r.above + i == 0, new_value = r.values[i] != cut.last;
    if (!first && (r.above + i >= most || float(mass) - r.masses[i] >= enough)) {
      cut.split = !new_value;
      return cut;
    }
    cut.room = new_value ? 1 : cut.room + 1;
    cut.last = r.values[i], cut.mass = mass;
  }
  cut.split = false;
  return cut;
}

// The id of the last token that `cut` leaves room for, among those that equal its last.
template <typename T>
static int64_t last_in_room(const LogitRow<T>& row, const Sweep& sweep, const Cut& cut) {
  if (!cut.split) return row.width;
  int64_t room = cut.room, id = -1;
  for (int64_t first = 0; room > 0 && first < row.width; first += VL) {
    if (!(sweep.run_max[first / kRun] >= cut.last)) continue;
    vi equal = scaled(row, first) == splat(cut.last);
    for (int i = 0; room > 0 && i < VL; ++i)
      if (equal[i]) id = first + i, --room;
  }
  return id;
}

// Where top-k and top-p end.
template <typename T>
static Cut ranked_cut(const LogitRow<T>& row, const SampleSpace& space, int64_t top_k, float top_p, float lowest) {
  float infinite = __builtin_inff();
  int64_t count = collect(row, space.sweep, lowest, space.values);
  if (count == 0) return {lowest, 0, false, 0};
  store(space.values + count, splat(-infinite));
  if (top_k >= row.width) {
    float enough = top_p * float(space.sweep.total);
    return cut_off(rank_around(space, count, lowest, top_k, enough), top_k, enough);
  }
  Ranked ranked = rank_around(space, count, lowest, top_k, infinite);
  Cut cut = cut_off(ranked, top_k, infinite);
  if (top_p >= 1.0f) return cut;
  float enough = top_p * float(cut.mass);
  if (ranked.above > 0) ranked = rank_around(space, count, lowest, top_k, enough);  // top-p may end among those before
  return cut_off(ranked, top_k, enough);
}

template <typename T>
INLINE vf kept_mass(const LogitRow<T>& row, const Kept& kept, int64_t i) {
  vf x = scaled(row, i), mass = exp(x - splat(kept.top)), last = splat(kept.last);
  vi ids;
  UNROLL for (int j = 0; j < VL; ++j) ids[j] = j;
  ids += int32_t(i);
  vi in = ((x > last) | ((x == last) & (ids <= int32_t(kept.last_id)))) & (mass >= splat(kept.min_mass));
  return in ? mass : (vf){};
}

// The mass that is kept of each block, and of all.
template <typename T>
static void sweep_kept(const LogitRow<T>& row, const Kept& kept, float lowest, Sweep& sweep) {
  sweep.total = 0;
  for (int64_t first = 0, b = 0; first < row.width; first += kBlock, ++b) {
    vf sums{};
    for (int64_t run = first; run < min1(row.width, first + kBlock); run += kRun) {
      if (!(sweep.run_max[run / kRun] >= lowest)) continue;
      for (int64_t i = run; i < min1(row.width, run + kRun); i += VL) sums += kept_mass(row, kept, i);
    }
    sweep.total += sweep.masses[b] = sum(sums);
  }
}

// The first id whose cumulative mass exceeds `target`.
template <typename T>
static int32_t draw(const LogitRow<T>& row, const Sweep& sweep, const Kept& kept, float target) {
  double before = 0;
  int64_t last = row.width - 1;  // where all are NaN or -inf
  for (int64_t first = 0, b = 0; first < row.width; first += kBlock, before += sweep.masses[b++]) {
    if (!(sweep.masses[b] > 0)) continue;
    bool here = float(before + sweep.masses[b]) > target;
    // The sums of blocks and of tokens may differ in the last bit, so the last token of mass is kept in mind.
    if (!here && before + sweep.masses[b] < sweep.total) continue;
    double sum = before;
    for (int64_t i = first; i < min1(row.width, first + kBlock); i += VL) {
      float masses[VL];
      store(masses, kept_mass(row, kept, i));
      for (int j = 0; j < VL; ++j) {
        sum += masses[j];
        if (masses[j] > 0) last = i + j;
        if (float(sum) > target) return int32_t(last);
      }
    }
    if (here) break;
  }
  return int32_t(last);
}

template <typename T>
static void sample_row(const void* opaque, int64_t index) {
  const SampleArgs& a = *static_cast<const SampleArgs*>(opaque);
  if (a.temperature[index] < a.greedy_below) {
    ArgmaxArgs argmax{a.logits, a.out, a.rows, a.width};
    return argmax_row<T>(&argmax, index);
  }
  LogitRow<T> row{static_cast<const T*>(a.logits.data) + index * a.logits.stride, a.width, a.width / VL * VL, 1.0f / a.temperature[index], {}};
  for (int64_t i = 0; i < VL; ++i) store1(row.rest + i, row.whole + i < row.width ? load1(row.data + row.whole + i) : -__builtin_inff());

  // A vector more of each: loops over vectors need no end of their own.
  int64_t blocks = ceil_div(a.width, kBlock), runs = ceil_div(a.width, kRun), tokens = ceil_div(a.width, VL) * VL + VL;
  char* at = static_cast<char*>(scratch(kSlotTile, size_t(blocks * 8 + (blocks + runs + VL + 3 * tokens) * 4)));
  SampleSpace space{};
  Sweep& sweep = space.sweep;
  sweep.masses = reinterpret_cast<double*>(at);
  sweep.block_top = reinterpret_cast<float*>(at + blocks * 8);
  sweep.run_max = sweep.block_top + blocks;
  space.values = sweep.run_max + runs + VL, space.sorted = space.values + tokens, space.sorted_masses = space.sorted + tokens;
  store(sweep.run_max + runs, splat(-__builtin_inff()));

  int64_t top_k = max1(int64_t(1), min1(a.width, int64_t(a.top_k[index])));
  float top_p = a.top_p[index], min_p = a.min_p[index];
  bool in_top_k = a.needs_filter && top_k < a.width, in_top_p = a.needs_filter && top_p < 1.0f;
  bool filtered = in_top_k || in_top_p || (a.needs_filter && min_p > 0.0f);
  sweep_logits(row, !filtered || (in_top_p && !in_top_k), sweep);
  Kept kept{-__builtin_inff(), sweep.top, 0.0f, a.width};
  if (filtered) {
    float lowest = lowest_kept(sweep, a.width, top_k, top_p, min_p);
    kept.min_mass = min_p;
    if (in_top_k || in_top_p) {
      Cut cut = ranked_cut(row, space, top_k, top_p, lowest);
      kept.last = lowest = cut.last, kept.last_id = last_in_room(row, sweep, cut);
    }
    sweep_kept(row, kept, lowest, sweep);
  }
  a.out[index] = draw(row, sweep, kept, uniform(a.seeds[index], a.positions[index]) * float(sweep.total));
}

static void sample(const SampleArgs& args) {
  run_tasks(args.rows, args.logits.dtype == DType::bf16 ? sample_row<uint16_t> : sample_row<float>, &args);
}
