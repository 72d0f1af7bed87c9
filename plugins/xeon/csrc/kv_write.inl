// kv.write and kv.write_mla: this step's keys and values, or latents and rotated keys, into their slots as the pool stores them.

// A head of a token in float32, into codes of T; the scales come first.
template <typename T>
INLINE void write_codes(const KvStore& to, int64_t at, const float* x, int64_t dim) {
  narrow_row(x, dim, static_cast<T*>(to.data) + at);
}

// x / scale, to the nearest code. The division is one, and no product with the inverse, as the definition has it.
INLINE void write_fp8(const KvStore& to, int64_t at, int64_t head, float* x) {
  float scale = to.head_scales[head];
  for (int64_t i = 0; i < to.dim; i += VL) store(x + i, load(x + i) / splat(scale));
  write_codes<Fp8>(to, at, x, to.dim);
}

// x is zero from dim to the end of its last vector.
INLINE void write_int8(const KvStore& to, int64_t at, int64_t scale_at, float* x) {
  vf most{}, nan{};
  for (int64_t i = 0; i < to.dim; i += VL) {
    vf size = (vf)((vu)load(x + i) & 0x7fffffffu);
    most = max(most, size);
    nan += size * 0.0f;  // a NaN, or an infinite one, makes the scale NaN, as it does in the definition
  }
  float scale = max_lane(most) / 127.0f + sum(nan) * 0.0f;
  to.token_scales[scale_at] = scale;
  vf divisor = splat(scale == 0.0f ? 1.0f : scale), magic = splat(12582912.0f);
  for (int64_t i = 0; i < to.dim; i += VL) {
    vf code = load(x + i) / divisor + magic - magic;
    code = min(max(code, splat(-127.0f)), splat(127.0f));
    store(x + i, code);
  }
  write_codes<int8_t>(to, at, x, to.dim);
}

INLINE void write_store(const KvWriteArgs& a, const Rows& from, const KvStore& to, int64_t token) {
  int64_t slot = a.slots[token], at = slot * to.row, width = a.num_heads * to.dim;
  bool same = a.kv_dtype == (from.dtype == DType::bf16 ? KvDType::bf16 : KvDType::f32);
  int64_t size = from.dtype == DType::bf16 ? 2 : 4;
  const char* row = static_cast<const char*>(from.data) + token * from.stride * size;
  if (same) {
    __builtin_memcpy(static_cast<char*>(to.data) + at * size, row, size_t(width * size));
    return;
  }
  float* x = static_cast<float*>(scratch(kSlotState, size_t(to.dim + VL) * sizeof(float)));
  for (int64_t head = 0; head < a.num_heads; ++head, at += to.dim, row += to.dim * size) {
    for (int64_t i = to.dim / VL * VL; i < to.dim + VL; ++i) x[i] = 0.0f;
    if (from.dtype == DType::bf16)
      widen_row(reinterpret_cast<const uint16_t*>(row), to.dim, x);
    else
      widen_row(reinterpret_cast<const float*>(row), to.dim, x);
    switch (a.kv_dtype) {
      case KvDType::f32: write_codes<float>(to, at, x, to.dim); break;
      case KvDType::bf16: write_codes<uint16_t>(to, at, x, to.dim); break;
      case KvDType::f16: write_codes<Half>(to, at, x, to.dim); break;
      case KvDType::fp8: write_fp8(to, at, head, x); break;
      case KvDType::int8: write_int8(to, at, slot * a.num_heads + head, x); break;
    }
  }
}

static void kv_write_one(const void* opaque, int64_t token) {
  const KvWriteArgs& a = *static_cast<const KvWriteArgs*>(opaque);
  write_store(a, a.k, a.k_store, token);
  write_store(a, a.v, a.v_store, token);
}

static void kv_write(const KvWriteArgs& args) {
  // Few tokens are copied faster than threads are woken. In order, so that of padding writes to one slot the last stays.
  if (args.num_tokens <= 32)
    for (int64_t token = 0; token < args.num_tokens; ++token) kv_write_one(&args, token);
  else
    run_tasks(args.num_tokens, kv_write_one, &args);
}
