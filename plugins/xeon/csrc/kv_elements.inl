// What pools store, as vectors of float32 and back. sglang_core/backend/kv_dtypes.py defines the codes.

struct Half {
  uint16_t bits;
};
struct Fp8 {
  uint8_t bits;  // e4m3fn
};

typedef uint8_t vbytes __attribute__((vector_size(VL), may_alias, aligned(1)));

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

INLINE vf load(const Half* p) {
  vu code = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu), size = code & 0x7fff;
  vf normal = (vf)((size << 13) + (size < 0x7c00 ? (vu){} + (112u << 23) : (vu){} + (224u << 23)));
  vf subnormal = to_float((vi)size) * 5.9604644775390625e-8f;  // 2^-24
  vf x = size < 0x400 ? subnormal : normal;
  return (vf)((vu)x | (code & 0x8000) << 16);
}

// In two steps, an instruction each: in one, the compiler goes byte by byte.
INLINE vu load_bytes_wide(const void* p) {
  return __builtin_convertvector(__builtin_convertvector(*static_cast<const vbytes*>(p), vh), vu);
}
INLINE void store_bytes(void* p, vu x) {
  *static_cast<vbytes*>(p) = __builtin_convertvector(__builtin_convertvector(x, vh), vbytes);
}

INLINE vf load(const Fp8* p) {
  vu code = load_bytes_wide(p), size = code & 0x7f;
  vf subnormal = to_float((vi)size) * 0.001953125f;  // 2^-9
  vf x = size < 8 ? subnormal : (vf)((size << 20) + (120u << 23));
  x = size == 0x7f ? (vf)((vu){} + 0x7fc00000u) : x;
  return (vf)((vu)x | (code & 0x80) << 24);
}

INLINE vf load(const int8_t* p) { return to_float((vi)(load_bytes_wide(p) ^ 0x80) - 0x80); }

// Round to nearest even; too large becomes infinite.
INLINE void store(Half* p, vf x) {
  vu bits = (vu)x & 0x7fffffffu, sign = ((vu)x >> 16) & 0x8000;
  vu normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  vu subnormal = (vu)((vf)bits + 0.5f) - 0x3f000000u;  // the sum's last bit is worth 2^-24
  vu code = bits < 0x38800000u ? subnormal : normal;
  code = bits >= 0x477ff000u ? (vu){} + 0x7c00u : code;
  code = bits > 0x7f800000u ? (vu){} + 0x7e00u : code;
  *reinterpret_cast<vh*>(p) = __builtin_convertvector(code | sign, vh);
}

// Round to nearest even; saturates at +-448.
INLINE void store(Fp8* p, vf x) {
  vu bits = (vu)x & 0x7fffffffu, sign = ((vu)x >> 24) & 0x80;
  vu normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
  vu subnormal = (vu)((vf)bits + 16384.0f) - 0x46800000u;  // the sum's last bit is worth 2^-9
  vu code = bits < 0x3c800000u ? subnormal : normal;
  code = bits >= 0x43e00000u ? (vu){} + 0x7eu : code;
  code = bits > 0x7f800000u ? (vu){} + 0x7fu : code;
  store_bytes(p, code | sign);
}

INLINE void store(int8_t* p, vf x) {  // whole numbers in +-127
  store_bytes(p, (vu)__builtin_convertvector(x, vi));
}

template <typename T>
INLINE void widen_row(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(out + i, load(in + i));
  if (i == count) return;
  T tail[VL] = {};
  for (int64_t j = i; j < count; ++j) tail[j - i] = in[j];
  float wide[VL];
  store(wide, load(tail));
  for (int64_t j = i; j < count; ++j) out[j] = wide[j - i];
}

template <typename T>
INLINE void narrow_row(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(out + i, load(in + i));
  if (i == count) return;
  float tail[VL] = {};
  for (int64_t j = i; j < count; ++j) tail[j - i] = in[j];
  T codes[VL];
  store(codes, load(tail));
  for (int64_t j = i; j < count; ++j) out[j] = codes[j - i];
}

typedef uint16_t vpairs __attribute__((vector_size(VL * 4), may_alias, aligned(2)));

// 2 * VL elements as bf16, which holds every code of fp8 and int8 exactly.
INLINE vpairs load_bf16s(const uint16_t* p) { return *reinterpret_cast<const vpairs*>(p); }

#ifdef HAS_DOT_BF16
typedef uint8_t vcodes __attribute__((vector_size(VL * 2), may_alias, aligned(1)));

INLINE vpairs load_bf16s(const Fp8* p) {
  alignas(64) static const uint16_t subnormals[2 * VL] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  vpairs code = __builtin_convertvector(*reinterpret_cast<const vcodes*>(p), vpairs), size = code & 0x7f;
  vpairs small = __builtin_shuffle(*reinterpret_cast<const vpairs*>(subnormals), size);  // looks at the low 5 bits
  vpairs x = size < 8 ? small : (size << 4) + 0x3c00;
  x = size == 0x7f ? (vpairs){} + 0x7fc0 : x;
  return x | (code & 0x80) << 8;
}

INLINE vpairs load_bf16s(const int8_t* p) {
  vf low = load(p), high = load(p + VL);
#ifdef EMULATE_AVX512
  vh halves[2] = {__builtin_convertvector((vu)low >> 16, vh), __builtin_convertvector((vu)high >> 16, vh)};
  vpairs both;
  __builtin_memcpy(&both, halves, sizeof both);
  return both;
#else
  return (vpairs)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
}

template <typename T>
INLINE void bf16_row(const T* in, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 2 * VL <= count; i += 2 * VL) *reinterpret_cast<vpairs*>(out + i) = load_bf16s(in + i);
  if (i == count) return;
  T tail[2 * VL] = {};
  for (int64_t j = i; j < count; ++j) tail[j - i] = in[j];
  vpairs codes = load_bf16s(tail);
  for (int64_t j = i; j < count; ++j) out[j] = codes[j - i];
}

// sum += in each lane the dot product of the pairs of a and b.
INLINE void dot(vf& sum, vpairs a, vpairs b) {
#ifdef EMULATE_AVX512
  sum += odd((vu)a) * odd((vu)b);
  sum += even((vu)a) * even((vu)b);
#else
  sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
}

INLINE void store_weights(uint16_t* p, vf x) {
#ifdef EMULATE_AVX512
  store_bf16(p, x);
#else
  *reinterpret_cast<vh*>(p) = (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
}
#else
INLINE void store_weights(float* p, vf x) { store(p, x); }
#endif
