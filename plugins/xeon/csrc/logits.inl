// Between the head and the sampler: bitmasks, penalties, soft caps.

// Word `word` of the bitmask says which of 32 logits stay; the last one may be cut short by the row's end.
template <typename T>
static void mask_row(const void* opaque, int64_t row) {
  const MaskArgs& a = *static_cast<const MaskArgs*>(opaque);
  const T* x = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  T* out = static_cast<T*>(a.out.data) + row * a.out.stride;
  const int32_t* words = a.bits + row * ceil_div(a.width, 32);
  vu lanes;
  UNROLL for (int i = 0; i < VL; ++i) lanes[i] = uint32_t(i);
  for (int64_t first = 0; first < a.width; first += 32) {
    uint32_t word = uint32_t(words[first / 32]);
    int64_t i = first, end = min1(a.width, first + 32);
    for (; i + VL <= end; i += VL) {
      vu allowed = (((vu){} + word) >> (lanes + uint32_t(i - first))) & 1;
      store(out + i, allowed ? load(x + i) : splat(-__builtin_inff()));
    }
    for (; i < end; ++i) store1(out + i, word >> (i - first) & 1 ? load1(x + i) : -__builtin_inff());
  }
}

static void mask(const MaskArgs& args) {
  if (args.logits.dtype == DType::bf16)
    each_row<mask_row<uint16_t>>(&args, args.rows, args.width);
  else
    each_row<mask_row<float>>(&args, args.rows, args.width);
}

template <typename T>
static void widen_logits(const void* opaque, int64_t row) {
  const AdjustArgs& a = *static_cast<const AdjustArgs*>(opaque);
  const T* x = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  float* out = a.out + row * a.width;
  int64_t i = 0;
  for (; i + VL <= a.width; i += VL) store(out + i, load(x + i));
  for (; i < a.width; ++i) out[i] = load1(x + i);
}

static void adjust(const AdjustArgs& a) {
  if (a.logits.dtype == DType::bf16)
    each_row<widen_logits<uint16_t>>(&a, a.rows, a.width);
  else
    each_row<widen_logits<float>>(&a, a.rows, a.width);
  for (int64_t e = 0; e < a.entries; ++e) {
    int64_t at = int64_t(a.row[e]) * a.logits.stride + a.id[e];
    float old = load1(a.logits.data, a.logits.dtype, at);
    float made = (old > 0 ? old / a.repetition[e] : old * a.repetition[e]) + a.add[e];
    // The change, as the op has it: padding may name an entry that is in use, and -inf must not become NaN.
    if (made != old) a.out[int64_t(a.row[e]) * a.width + a.id[e]] += made - old;
  }
}

template <typename T>
static void soft_cap_row(const void* opaque, int64_t row) {
  const SoftCapArgs& a = *static_cast<const SoftCapArgs*>(opaque);
  const T* x = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  float* out = a.out + row * a.width;
  int64_t i = 0;
  for (; i + VL <= a.width; i += VL) store(out + i, tanh(load(x + i) / splat(a.cap)) * a.cap);
  for (; i < a.width; ++i) out[i] = tanh(splat(load1(x + i) / a.cap))[0] * a.cap;
}

static void soft_cap(const SoftCapArgs& args) {
  // An exponential costs about as much as eight plain elements.
  if (args.logits.dtype == DType::bf16)
    each_row<soft_cap_row<uint16_t>>(&args, args.rows, args.width * 8);
  else
    each_row<soft_cap_row<float>>(&args, args.rows, args.width * 8);
}
