// moe.route: one pass over a token's scores keeps the best so far in order. Equal scores rank by id, for the pass goes by id.

// Puts (score, id) into a list of the best, highest first, of which `count` are known; it holds `most` at most.
INLINE void rank(float score, int32_t id, float* scores, int32_t* ids, int64_t most, int64_t& count) {
  if (count == most && score <= scores[most - 1]) return;
  int64_t at = count < most ? count++ : most - 1;
  for (; at > 0 && !(score <= scores[at - 1]); --at) scores[at] = scores[at - 1], ids[at] = ids[at - 1];
  scores[at] = score, ids[at] = id;
}

// A group's best score, or the sum of its best two.
INLINE float group_score(const float* choice, int64_t size, bool best_two) {
  float best = choice[0], second = -__builtin_inff();
  for (int64_t i = 1; i < size; ++i) {
    second = max1(second, choice[i] > best ? best : choice[i]);
    best = max1(choice[i], best);
  }
  return best_two ? best + second : best;
}

template <typename T>
static void route_token(const void* opaque, int64_t token) {
  const RouteArgs& a = *static_cast<const RouteArgs*>(opaque);
  int64_t experts = a.num_experts, padded = ceil_div(experts, VL) * VL, lists = max1(a.top_k, a.top_groups);
  float* scores = static_cast<float*>(scratch(kSlotTile, size_t(2 * padded + 2 * lists + ceil_div(a.num_groups, VL) * VL) * 4));
  float *choice = scores + padded, *best = choice + padded;
  int32_t* groups = reinterpret_cast<int32_t*>(best + lists);
  float* in_group = reinterpret_cast<float*>(groups + lists);  // whether a group was chosen
  const T* logits = static_cast<const T*>(a.logits.data) + token * a.logits.stride;

  float top = -__builtin_inff();
  for (int64_t i = 0; i < experts; ++i) {
    scores[i] = load1(logits + i);
    top = max1(scores[i], top);
  }
  for (int64_t i = experts; i < padded; ++i) scores[i] = -__builtin_inff();
  if (a.scoring == Scoring::softmax) {
    vf sums{};
    for (int64_t i = 0; i < padded; i += VL) {
      vf mass = exp(load(scores + i) - splat(top));
      store(scores + i, mass);
      sums += mass;
    }
    vf total = splat(sum(sums));
    for (int64_t i = 0; i < padded; i += VL) store(scores + i, load(scores + i) / total);
  } else if (a.scoring == Scoring::sigmoid) {
    for (int64_t i = 0; i < padded; i += VL) store(scores + i, sigmoid(load(scores + i)));
  }
  for (int64_t i = 0; i < experts; ++i) choice[i] = a.bias ? scores[i] + a.bias[i] : scores[i];

  int64_t size = experts / a.num_groups, count = 0;
  for (int64_t g = 0; g < a.num_groups; ++g) in_group[g] = a.top_groups == a.num_groups;
  if (a.top_groups < a.num_groups) {
    for (int64_t g = 0; g < a.num_groups; ++g)
      rank(group_score(choice + g * size, size, a.best_two), int32_t(g), best, groups, a.top_groups, count);
    for (int64_t i = 0; i < count; ++i) in_group[groups[i]] = 1.0f;
  }
  int32_t* ids = a.ids + token * a.top_k;
  float* weights = a.weights + token * a.top_k;
  count = 0;
  for (int64_t g = 0; g < a.num_groups; ++g) {
    if (in_group[g] == 0.0f) continue;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) rank(choice[i], int32_t(i), best, ids, a.top_k, count);
  }

  float total = 0;
  for (int64_t k = 0; k < a.top_k; ++k) weights[k] = scores[ids[k]];
  if (a.scoring == Scoring::softmax_after_top_k) {
    float most = weights[0];
    for (int64_t k = 1; k < a.top_k; ++k) most = max1(weights[k], most);
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k] = exp(splat(weights[k] - most))[0];
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] /= total;
    total = 0;
  }
  if (a.renormalize) {
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k];
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] /= total + 1e-20f;
  }
  for (int64_t k = 0; k < a.top_k; ++k) weights[k] *= a.scale;
}

static void route(const RouteArgs& args) {
  // An exponential costs about as much as eight plain elements.
  if (args.logits.dtype == DType::bf16)
    each_row<route_token<uint16_t>>(&args, args.tokens, args.num_experts * 8);
  else
    each_row<route_token<float>>(&args, args.tokens, args.num_experts * 8);
}
