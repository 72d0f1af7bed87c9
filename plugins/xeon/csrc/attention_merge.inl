// attn.merge: two results over disjoint keys. An empty side has lse -inf, and its values, which may be NaN, are not looked at.

template <typename T>
static void merge_row(const MergeArgs& m, int64_t row) {
  float top = max1(m.lse_a[row], m.lse_b[row]);
  if (top == kNegInf) top = 0.0f;
  float weight_a = exp(splat(m.lse_a[row] - top))[0], weight_b = exp(splat(m.lse_b[row] - top))[0], total = weight_a + weight_b;
  float inverse = total > 0.0f ? 1.0f / total : 1.0f;
  const T *a = static_cast<const T*>(m.a) + row * m.dim, *b = static_cast<const T*>(m.b) + row * m.dim;
  T* out = static_cast<T*>(m.out) + row * m.dim;
  auto mixed = [&](vf x, vf y) __attribute__((always_inline)) {
    return ((weight_a > 0.0f ? x * weight_a : vf{}) + (weight_b > 0.0f ? y * weight_b : vf{})) * inverse;
  };
  int64_t d = 0;
  for (; d + VL <= m.dim; d += VL) store(out + d, mixed(load(a + d), load(b + d)));
  for (; d < m.dim; ++d) store1(out + d, mixed(splat(load1(a + d)), splat(load1(b + d)))[0]);
  m.lse[row] = (total > 0.0f ? __builtin_logf(total) : kNegInf) + top;
}

static void merge_one(const void* opaque, int64_t row) {
  const MergeArgs& m = *static_cast<const MergeArgs*>(opaque);
  if (m.dtype == DType::bf16)
    merge_row<uint16_t>(m, row);
  else
    merge_row<float>(m, row);
}

static void merge(const MergeArgs& m) { run_tasks(m.rows, merge_one, &m); }
