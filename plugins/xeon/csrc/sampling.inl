// sample.sample, a row a task, without sorting the vocabulary. A bound, from the largest value of every 64, or from the whole
// mass, leaves few candidates where the distribution has a peak; many of them are sorted into buckets by value, and only the
// bucket where top-k or top-p ends is sorted. Sums run in double precision in the order of the ids, as the body's do.

constexpr int64_t kRun = 64;        // tokens that share a maximum
constexpr int64_t kMassBlock = 1024;  // tokens that share a sum
constexpr int64_t kBuckets = 2048;  // also: candidates up to which all are sorted
constexpr float kNoMass = -87.3f;   // `exp` is 0 below it

struct Candidates {
  float* scaled;
  float* mass;
  int32_t* ids;
  float* sorted;  // room to sort in
  int64_t count;
  float top, per_unit;  // bucket = (top - scaled) * per_unit
  int64_t buckets;
  int64_t* bucket_count;
  double* bucket_mass;
};

// The tokens that top-k and top-p leave: those above `last`, and the first `room` that equal it.
struct Cut {
  float last;
  int64_t room;
  double mass;
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

INLINE int64_t bucket_of(const Candidates& c, float scaled) {
  float bucket = (c.top - scaled) * c.per_unit;  // NaN where both are infinite
  return bucket > 0.0f ? min1(int64_t(bucket), c.buckets - 1) : 0;
}

static void fill_buckets(Candidates& c, float lowest) {
  c.buckets = c.count <= kBuckets ? 1 : kBuckets;
  c.per_unit = c.top > lowest ? float(c.buckets) / (c.top - lowest) : 0.0f;
  for (int64_t b = 0; b < c.buckets; ++b) c.bucket_count[b] = 0, c.bucket_mass[b] = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    int64_t b = bucket_of(c, c.scaled[i]);
    ++c.bucket_count[b], c.bucket_mass[b] += c.mass[i];
  }
}

INLINE float mass_of(float scaled, float top) { return exp(splat(scaled - top))[0]; }

// Most likely first: stops after `most` tokens, or before the token that has `enough` mass before it, but not before the first.
static Cut walk(const Candidates& c, int64_t most, float enough) {
  Cut cut{c.top, 0, 0};
  int64_t taken = 0;
  for (int64_t b = 0; b < c.buckets; ++b) {
    if (c.bucket_count[b] == 0) continue;
    bool ends = taken + c.bucket_count[b] >= most || cut.mass + c.bucket_mass[b] >= enough;
    if (!ends) {
      taken += c.bucket_count[b], cut.mass += c.bucket_mass[b];
      continue;
    }
    int64_t size = 0;
    for (int64_t i = 0; i < c.count; ++i)
      if (bucket_of(c, c.scaled[i]) == b) c.sorted[size++] = c.scaled[i];
    sort_descending(c.sorted, size);
    for (int64_t i = 0; i < size; ++i) {
      float mass = mass_of(c.sorted[i], c.top);
      double sum = cut.mass + mass;
      if (taken > 0 && (taken == most || float(sum) - mass >= enough)) {
        if (c.sorted[i] != cut.last) cut = {c.sorted[i], 0, cut.mass};  // all above it
        return cut;
      }
      cut.room = taken > 0 && c.sorted[i] == cut.last ? cut.room + 1 : 1;
      cut.last = c.sorted[i], cut.mass = sum, ++taken;
    }
  }
  return {-__builtin_inff(), 0, cut.mass};  // all
}

// scaled[i] = logits[i] / temperature, -inf up to a whole run; the maximum of each run, and of all.
template <typename T>
static float scale_logits(const T* logits, int64_t width, float temperature, float* scaled, float* run_max) {
  float top = -__builtin_inff();
  for (int64_t first = 0; first < width; first += kRun) {
    vf most = splat(-__builtin_inff());
    int64_t end = min1(width, first + kRun), i = first;
    for (; i + VL <= end; i += VL) {
      vf x = load(logits + i) / splat(temperature);
      store(scaled + i, x);
      most = max(x, most);
    }
    float rest = -__builtin_inff();
    for (; i < end; ++i) {
      scaled[i] = load1(logits + i) / temperature;
      rest = max1(scaled[i], rest);
    }
    for (; i < first + kRun; ++i) scaled[i] = -__builtin_inff();
    float run = max1(max_lane(most), rest);
    run_max[first / kRun] = run, top = max1(run, top);
  }
  return top;
}

// The mass of each block of tokens, and of all; `scaled` is filled up to whole runs.
static double block_masses(const float* scaled, int64_t width, float top, double* masses) {
  double total = 0;
  for (int64_t first = 0, b = 0; first < width; first += kMassBlock, ++b) {
    vf sums[2] = {};
    int64_t end = min1(width, first + kMassBlock);
    for (int64_t i = first; i < end; i += 2 * VL) {
      sums[0] += exp(load(scaled + i) - splat(top));
      sums[1] += exp(load(scaled + i + VL) - splat(top));
    }
    masses[b] = sum(sums[0] + sums[1]);
    total += masses[b];
  }
  return total;
}

// The first id whose cumulative mass exceeds `target`.
static int32_t draw_from_all(const float* scaled, int64_t width, float top, const double* masses, float target) {
  double before = 0;
  int64_t last = 0;
  for (int64_t first = 0, b = 0; first < width; first += kMassBlock, before += masses[b], ++b) {
    if (masses[b] > 0) last = first;
    if (float(before + masses[b]) <= target) continue;
    double sum = before;
    for (int64_t i = first; i < min1(width, first + kMassBlock); ++i) {
      float mass = mass_of(scaled[i], top);
      sum += mass;
      if (mass > 0) last = i;
      if (float(sum) > target) return int32_t(i);
    }
  }
  return int32_t(last);  // the sums of blocks and of tokens may differ in the last bit
}

// Below it no token is kept whatever is summed: by top-k, by top-p, and by min-p where that changes no sum.
static float lowest_kept(
    const float* run_max, int64_t width, int64_t top_k, float top_p, float min_p, float top, double total, float* room) {
  float lowest = top + kNoMass;
  int64_t runs = ceil_div(width, kRun);
  if (top_k < width && top_k <= runs) {
    // As many runs have a token at or above it.
    for (int64_t i = 0; i < runs; ++i) room[i] = run_max[i];
    lowest = max1(lowest, kth_largest(room, runs, top_k));
  }
  if (top_k >= width && top_p < 1.0f) {
    // Tokens with less mass than this have half of what top-p cuts off, all together.
    float mass = 0.5f * (1.0f - top_p) * float(total) / float(width);
    if (mass > 0.0f) lowest = max1(lowest, top + __builtin_logf(mass));
  }
  if (min_p > 0.0f && (top_k >= width || top_p >= 1.0f)) lowest = max1(lowest, top + __builtin_logf(min_p) - 1e-3f);
  return min1(lowest, top);
}

struct SampleSpace {
  float *scaled, *run_max, *room;
  double* masses;
  Candidates c;
};

static int32_t draw_filtered(const SampleArgs& a, int64_t row, SampleSpace& space, float top) {
  int64_t width = a.width, top_k = max1(int64_t(1), min1(width, int64_t(a.top_k[row])));
  float top_p = a.top_p[row], min_p = a.min_p[row];
  bool ranked = top_k < width || top_p < 1.0f;
  double total = top_k >= width && top_p < 1.0f ? block_masses(space.scaled, width, top, space.masses) : 0.0;
  float lowest = lowest_kept(space.run_max, width, top_k, top_p, min_p, top, total, space.room);
  Candidates& c = space.c;
  c.count = 0, c.top = top;
  for (int64_t first = 0; first < width; first += kRun) {
    if (!(space.run_max[first / kRun] >= lowest)) continue;
    for (int64_t i = first, end = min1(width, first + kRun); i < end; ++i) {
      c.scaled[c.count] = space.scaled[i], c.ids[c.count] = int32_t(i);
      c.count += space.scaled[i] >= lowest;
    }
  }
  if (c.count == 0) return int32_t(width - 1);  // all are NaN or -inf
  for (int64_t i = 0; i < c.count; i += VL) store(c.mass + i, exp(load(c.scaled + i) - splat(top)));

  Cut cut{-__builtin_inff(), 0, 0};
  if (ranked) {
    fill_buckets(c, lowest);
    float infinite = __builtin_inff(), enough = infinite;
    if (top_p < 1.0f) enough = top_p * float(top_k < width ? walk(c, top_k, infinite).mass : total);
    cut = walk(c, top_k, enough);
  }
  double kept = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    bool in = c.scaled[i] > cut.last || (c.scaled[i] == cut.last && cut.room-- > 0);
    if (!in || c.mass[i] < min_p) c.mass[i] = 0.0f;
    kept += c.mass[i];
  }
  float target = uniform(a.seeds[row], a.positions[row]) * float(kept);
  double sum = 0;
  int32_t last = c.ids[0];
  for (int64_t i = 0; i < c.count; ++i) {
    sum += c.mass[i];
    if (c.mass[i] > 0) last = c.ids[i];
    if (float(sum) > target) return last;
  }
  return last;
}

template <typename T>
static void sample_row(const void* opaque, int64_t row) {
  const SampleArgs& a = *static_cast<const SampleArgs*>(opaque);
  if (a.temperature[row] < a.greedy_below) {
    ArgmaxArgs argmax{a.logits, a.out, a.rows, a.width};
    return argmax_row<T>(&argmax, row);
  }
  // Whole runs and a vector more of each: loops over vectors need no end of their own.
  int64_t padded = ceil_div(a.width, kMassBlock) * kMassBlock + kRun, runs = padded / kRun + 1;
  int64_t doubles = kBuckets * 2 + padded / kMassBlock + 1;
  char* at = static_cast<char*>(scratch(kSlotTile, size_t(doubles * 8 + (padded * 4 + runs * 2 + padded) * 4)));
  SampleSpace space;
  space.c.bucket_mass = reinterpret_cast<double*>(at), at += kBuckets * 8;
  space.c.bucket_count = reinterpret_cast<int64_t*>(at), at += kBuckets * 8;
  space.masses = reinterpret_cast<double*>(at), at += (padded / kMassBlock + 1) * 8;
  float* floats = reinterpret_cast<float*>(at);
  space.scaled = floats, floats += padded;
  space.c.scaled = floats, floats += padded;
  space.c.mass = floats, floats += padded;
  space.c.sorted = floats, floats += padded;
  space.run_max = floats, floats += runs;
  space.room = floats, floats += runs;
  space.c.ids = reinterpret_cast<int32_t*>(floats);

  const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  float top = scale_logits(logits, a.width, a.temperature[row], space.scaled, space.run_max);
  bool filtered = a.needs_filter && (a.top_k[row] < a.width || a.top_p[row] < 1.0f || a.min_p[row] > 0.0f);
  if (filtered) {
    a.out[row] = draw_filtered(a, row, space, top);
    return;
  }
  double total = block_masses(space.scaled, a.width, top, space.masses);
  float target = uniform(a.seeds[row], a.positions[row]) * float(total);
  a.out[row] = draw_from_all(space.scaled, a.width, top, space.masses, target);
}

static void sample(const SampleArgs& args) {
  run_tasks(args.rows, args.logits.dtype == DType::bf16 ? sample_row<uint16_t> : sample_row<float>, &args);
}
