// Keys that several reqs share: pages that their tables begin with alike, as the radix cache gives them. a.sharing has the reqs in
// the order of their tables, so those of a run of shared keys are neighbours, and runs make a tree: what all share, then what some
// share beyond that. The queries of all reqs of a run are the rows of one matrix, and its keys are read once for them; the keys
// after its last run a req visits alone, and merge_parts puts the softmaxes together. (Hydragen, arXiv 2402.05099; cascade
// attention in FlashInfer.)

constexpr int64_t kLeastShared = 128;  // keys of a run: merging costs a req about what reading ten keys does
constexpr int64_t kLeastPart = 128;    // keys of a run that a task visits at least, if there are tasks enough

struct SharedRun {
  int32_t begin, end;      // keys [begin, end) of each of its reqs
  int32_t first, last;     // its queries: Sharing::tokens[first .. last)
  int32_t req;             // one of its reqs
  int32_t above;           // the run that ends where this one begins; -1: none
  int32_t partial, parts;  // first row of its partial results, [parts][KV heads][queries x group], set by cut_runs
};

struct Sharing {
  SharedRun* runs;
  int64_t num_runs;
  int32_t* last_run;  // [R]: the run after which a req is alone; -1: none
  int32_t* place;     // [R]: of a req's first query in `tokens`
  int32_t* tokens;    // [T]: the queries in the order of a.sharing

  INLINE_MEMBER int32_t last_run_of(int64_t req) const { return num_runs ? last_run[req] : -1; }
  INLINE_MEMBER int64_t own_keys_begin(int64_t req) const {
    int32_t run = last_run_of(req);
    return run < 0 ? 0 : runs[run].end;
  }
};

// Runs of the reqs at [i, j) of the order, which share their first `begin` pages; the last of these runs is `above`.
static void find_runs(const AttentionArgs& a, Sharing& s, int64_t i, int64_t j, int64_t begin, int32_t above) {
  const int32_t *order = a.sharing, *pages = order + a.num_reqs;
  if (j - i == 1) {
    s.last_run[order[i]] = above;
    return;
  }
  int64_t common = pages[i + 1];
  for (int64_t k = i + 2; k < j; ++k) common = min1(common, int64_t(pages[k]));
  if ((common - begin) * a.page_size >= kLeastShared) {
    int64_t last = order[j - 1], queries = a.cu_extend[last + 1] - a.cu_extend[last];
    s.runs[s.num_runs] = {int32_t(begin * a.page_size),  int32_t(common * a.page_size), s.place[order[i]],
                          int32_t(s.place[last] + queries), order[i], above, 0, 0};
    above = int32_t(s.num_runs++), begin = common;
  }
  for (int64_t k = i + 1; k <= j; ++k) {
    if (k < j && pages[k] > common) continue;
    find_runs(a, s, i, k, begin, above);
    i = k;
  }
}

static Sharing find_shared(const AttentionArgs& a) {
  Sharing s{};
  int64_t reqs = a.num_reqs, most = 0;
  for (int64_t i = 1; a.sharing && i < reqs; ++i) most = max1(most, int64_t(a.sharing[reqs + i]));
  if (most * a.page_size < kLeastShared) return s;
  size_t bytes = size_t(reqs) * (sizeof(SharedRun) + 2 * sizeof(int32_t)) + size_t(a.cu_extend[reqs]) * sizeof(int32_t);
  s.runs = static_cast<SharedRun*>(scratch(kSlotPlan, bytes));  // sets of two reqs or more that are in each other or apart
  s.last_run = reinterpret_cast<int32_t*>(s.runs + reqs), s.place = s.last_run + reqs, s.tokens = s.place + reqs;
  int32_t place = 0;
  for (int64_t i = 0; i < reqs; ++i) {
    int64_t req = a.sharing[i];
    s.place[req] = place;
    for (int32_t token = a.cu_extend[req]; token < a.cu_extend[req + 1]; ++token) s.tokens[place++] = token;
  }
  find_runs(a, s, 0, reqs, 0, -1);
  return s;
}

// Tasks over the runs' keys, `part` of them each; see cut.
static void cut_runs(const AttentionArgs& a, Sharing& s, int64_t direct_heads, int64_t part, TaskList& list) {
  int64_t group = a.group(), length = max1(int64_t(1), kTileRows / group);
  for (int64_t i = 0; i < s.num_runs; ++i) {
    SharedRun& run = s.runs[i];
    int64_t queries = run.last - run.first, keys = run.end - run.begin;
    int64_t heads = is_direct(a, queries * group) ? direct_heads : 1;
    run.partial = int32_t(list.partial_rows), run.parts = int32_t(ceil_div(keys, part));
    for (int64_t p = 0; p < run.parts; ++p) {
      for (int64_t head = 0; head < a.num_kv_heads; head += heads) {
        for (int64_t query = 0; query < queries; query += length) {  // few enough for the direct way are one tile
          int64_t row = run.partial + ((p * a.num_kv_heads + head) * queries + query) * group;
          int64_t begin = run.begin + p * part;
          list.add({run.req, int32_t(head), int32_t(min1(heads, a.num_kv_heads - head)), 0, int32_t(min1(length, queries - query)),
                    int32_t(begin), int32_t(min1(int64_t(run.end), begin + part)), int32_t(row), 0, s.tokens + run.first + query});
        }
      }
    }
    list.partial_rows += run.parts * a.num_kv_heads * queries * group;
  }
}
