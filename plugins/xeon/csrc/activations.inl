// Activations as the tiles read them: float32, bf16 pairs, or bytes for int8 weights; quantised as the weight's format says.
// Codes are those of sglang_core/ops/quant.py, bit for bit: float32, true divisions, ties to even.

#ifdef HAS_DOT_BF16
typedef uint8_t ActInt8;  // code + 128
constexpr int32_t kInt8Bias = 128;
#else
typedef int16_t ActInt8;  // the codes k0, k2, k1, k3 of a quad
constexpr int32_t kInt8Bias = 0;
#endif

// Rows of x, prepared. `stride` counts elements, a multiple of no power of two, so that rows do not share L1 sets; past k_padded
// rows are filled with zeros to a multiple of kActAlign.
struct Activations {
  const void* data;
  int64_t stride;
  const float* row_scale;    // [m] or null
  const float* group_scale;  // [m][groups] or null
  const int32_t* row_zero;   // [m], for int8: what a code is too large by
};
constexpr int64_t kActAlign = 64;

INLINE vf load_any(const void* x, DType dtype, int64_t i) {
  if (dtype == DType::bf16) return load_bf16(static_cast<const uint16_t*>(x) + i);
  if (dtype == DType::f32) return load(static_cast<const float*>(x) + i);
  return load_f16(static_cast<const uint16_t*>(x) + i);
}

// To float32, in the order of the weight's k, with zeros up to a whole unit of kActAlign.
static void widen_row(const Rows& x, int64_t row, const Weight& w, float* out) {
  int64_t size = x.dtype == DType::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(x.data) + row * x.stride * size;
  int64_t padded = ceil_div(w.k_padded, kActAlign) * kActAlign, i = 0;
  float tail[VL];
  if (w.order) {
    for (; i < w.k_padded; ++i) {
      char one[VL * 4] = {};
      if (w.order[i] >= 0) __builtin_memcpy(one, from + w.order[i] * size, size_t(size));
      out[i] = w.order[i] >= 0 ? load_any(one, x.dtype, 0)[0] : 0.0f;
    }
  } else {
    for (; i + VL <= w.k; i += VL) store(out + i, load_any(from, x.dtype, i));
    if (i < w.k) {
      char rest[VL * 4] = {};
      __builtin_memcpy(rest, from + i * size, size_t((w.k - i) * size));
      store(tail, load_any(rest, x.dtype, 0));
      for (int64_t j = 0; i < w.k; ++i, ++j) out[i] = tail[j];
    }
  }
  for (; i < padded; ++i) out[i] = 0.0f;
}

INLINE vf absolute(vf x) { return (vf)((vu)x & 0x7fffffffu); }
INLINE vf round_even(vf x) {  // |x| < 2^22
  vf magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// Largest magnitude of x[0, count), count a multiple of VL; NaN where one is.
INLINE float amax(const float* x, int64_t count) {
  vf top = {}, odd_one = {};
  for (int64_t i = 0; i < count; i += VL) {
    vf y = load(x + i);
    top = max(top, absolute(y));
    odd_one += y == y ? vf{} : y;
  }
  float bad = sum(odd_one);
  return bad == bad ? max_lane(top) : bad;
}
INLINE float scale_of(float amax, float top) {
  float scale = amax / top;
  return scale == 0.0f ? 1.0f : scale;
}

// x / scale rounded to what fp8 (3 bits of mantissa, from 2^-6) or e2m1 (1 bit, from 1) has, saturated.
template <int Bits>
INLINE vf to_grid(vf x, float scale) {
  constexpr float top = Bits == 3 ? 448.0f : 6.0f, smallest = Bits == 3 ? 0.015625f : 1.0f;
  constexpr float magic = Bits == 3 ? 24576.0f : 6291456.0f;  // 1.5 * 2^23 times the subnormals' step
  constexpr int shift = 23 - Bits;
  vf y = x / splat(scale);
  y = y == y ? min(max(y, splat(-top)), splat(top)) : y;
  vu bits = (vu)y;
  vu rounded = (bits + ((1u << (shift - 1)) - 1) + (bits >> shift & 1)) & ~((1u << shift) - 1);
  vf small = (y + splat(magic)) - splat(magic);
  return y == y ? (absolute(y) < splat(smallest) ? small : (vf)rounded) : y;
}

INLINE float to_fp8(float x, float scale) { return to_grid<3>(splat(x), scale)[0]; }

template <int Bits>
static void to_grid(float* x, int64_t count, float scale) {
  for (int64_t i = 0; i < count; i += VL) store(x + i, to_grid<Bits>(load(x + i), scale));
}

// x[0, padded) -> what is multiplied, in place, and its scales.
static void quantize_row(float* x, const Weight& w, Quantize kind, const float* x_scale, float* row_scale, float* group_scale) {
  int64_t padded = ceil_div(w.k_padded, kActAlign) * kActAlign;
  switch (kind) {
    case Quantize::fp8:
      *row_scale = scale_of(amax(x, padded), 448.0f);
      return to_grid<3>(x, padded, *row_scale);
    case Quantize::fp8_static:
      *row_scale = *x_scale;
      return to_grid<3>(x, padded, *row_scale);
    case Quantize::fp8_block:
      for (int64_t g = 0; g < w.groups; ++g) {
        int64_t begin = g * w.group, end = min1(begin + w.group, padded);
        group_scale[g] = scale_of(amax(x + begin, end - begin), 448.0f);
        to_grid<3>(x + begin, end - begin, group_scale[g]);
      }
      return;
    case Quantize::nvfp4:
    case Quantize::nvfp4_static:
      *row_scale = kind == Quantize::nvfp4 ? scale_of(amax(x, padded), 6.0f * 448.0f) : *x_scale;
      for (int64_t i = 0; i < padded; i += 16) {
        // A code times its group's e4m3 scale has 6 significant bits: exact in bf16.
        float scale = to_fp8(amax(x + i, 16) / 6.0f, *row_scale), whole = scale * *row_scale;
        for (int64_t j = i; j < i + 16; j += VL)
          store(x + j, whole == 0.0f ? vf{} : to_grid<2 - 1>(load(x + j), whole) * splat(scale));
      }
      return;
    default: return;
  }
}

// int8 codes, whole numbers; gives the zero point.
static float quantize_row_int8(float* x, int64_t padded, bool asymmetric, float* row_scale) {
  vf low = {}, high = {};
  float zero = 0.0f;
  if (asymmetric) {
    float nan = amax(x, padded);
    for (int64_t i = 0; i < padded; i += VL) low = min(low, load(x + i)), high = max(high, load(x + i));
    float least = -max_lane(-low);
    *row_scale = nan == nan ? scale_of(max_lane(high) - least, 255.0f) : nan;
    zero = -128.0f - round_even(splat(least / *row_scale))[0];
    zero = max1(-128.0f, zero < 127.0f ? zero : 127.0f);
  } else {
    *row_scale = scale_of(amax(x, padded), 127.0f);
  }
  vf least = splat(asymmetric ? -128.0f : -127.0f);
  for (int64_t i = 0; i < padded; i += VL) {
    vf code = round_even(load(x + i) / splat(*row_scale)) + splat(zero);
    store(x + i, min(max(code, least), splat(127.0f)));
  }
  return zero;
}

// Bytes that `m` prepared rows take, and where in them each part lies.
static int64_t lay_out(const Weight& w, Quantize kind, int64_t m, void* memory, Activations& out) {
  int64_t stride = ceil_div(w.k_padded, kActAlign) * kActAlign + 16;
  int64_t size = w.element == Element::int8 ? int64_t(sizeof(ActInt8)) : int64_t(sizeof(Act));
  int64_t rows = ceil_div(m * stride * size, 64) * 64, per_row = ceil_div(m * 4, 64) * 64;
  char* at = static_cast<char*>(memory);
  bool block = kind == Quantize::fp8_block;
  float* scale = reinterpret_cast<float*>(at + rows);
  out = {at, stride, nullptr, nullptr, nullptr};
  if (block && w.groups > 1)
    out.group_scale = scale;
  else if (kind != Quantize::as_is)
    out.row_scale = scale;
  int64_t scales = ceil_div(m * (block ? w.groups : 1) * 4, 64) * 64;
  if (w.element == Element::int8) out.row_zero = reinterpret_cast<int32_t*>(at + rows + scales);
  return rows + scales + per_row;
}

// Row `row` of x into row `to` of what `lay_out` laid out.
static void prepare_row(const Rows& x, int64_t row, const Weight& w, Quantize kind, const float* x_scale, const Activations& out, int64_t to) {
  int64_t padded = ceil_div(w.k_padded, kActAlign) * kActAlign;
#ifdef HAS_DOT_BF16
  if (kind == Quantize::as_is && !w.order && x.dtype == DType::bf16) {
    uint16_t* at = static_cast<uint16_t*>(const_cast<void*>(out.data)) + to * out.stride;
    __builtin_memcpy(at, static_cast<const uint16_t*>(x.data) + row * x.stride, size_t(w.k) * 2);
    __builtin_memset(at + w.k, 0, size_t(padded - w.k) * 2);
    return;
  }
#endif
  float* wide = static_cast<float*>(scratch(kSlotWideRow, size_t(padded) * 4));
  widen_row(x, row, w, wide);
  float* scale = const_cast<float*>(out.row_scale ? out.row_scale + to : nullptr);
  if (w.element == Element::int8) {
    float zero = quantize_row_int8(wide, padded, kind == Quantize::int8_asym, scale);
    const_cast<int32_t*>(out.row_zero)[to] = int32_t(zero) + kInt8Bias;
    ActInt8* at = static_cast<ActInt8*>(const_cast<void*>(out.data)) + to * out.stride;
    for (int64_t i = 0; i < padded; i += 4)
      for (int64_t j = 0; j < 4; ++j) {
        int64_t place = kInt8Bias ? j : (j == 1 ? 2 : j == 2 ? 1 : j);
        at[i + place] = ActInt8(int32_t(wide[i + j]) + kInt8Bias);
      }
    return;
  }
  float* group_scale = const_cast<float*>(out.group_scale ? out.group_scale + to * w.groups : scale);
  quantize_row(wide, w, kind, x_scale, scale, group_scale);
  Act* at = static_cast<Act*>(const_cast<void*>(out.data)) + to * out.stride;
  for (int64_t i = 0; i < padded; i += VL) store(at + i, load(wide + i));
}
