// The sum over ranks. Added in rank order in float32 and rounded once, so every rank gets the same bits.

constexpr int64_t kSumElements = 16384;  // elements a task

template <typename T>
static void sum_some(const void* opaque, int64_t index) {
  const SumArgs& a = *static_cast<const SumArgs*>(opaque);
  int64_t i = index * kSumElements, end = min1(a.count, i + kSumElements);
  T* out = static_cast<T*>(a.out);
  for (; i + VL <= end; i += VL) {
    vf total = load(static_cast<const T*>(a.parts[0]) + i);
    for (int64_t p = 1; p < a.num_parts; ++p) total += load(static_cast<const T*>(a.parts[p]) + i);
    store(out + i, total);
  }
  for (; i < end; ++i) {
    float total = load1(static_cast<const T*>(a.parts[0]) + i);
    for (int64_t p = 1; p < a.num_parts; ++p) total += load1(static_cast<const T*>(a.parts[p]) + i);
    store1(out + i, total);
  }
}

static void sum_parts(const SumArgs& args) {
  run_tasks(ceil_div(args.count, kSumElements), args.dtype == DType::bf16 ? sum_some<uint16_t> : sum_some<float>, &args);
}
