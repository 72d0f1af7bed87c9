// Vectors of VL floats in GCC's vector notation: the same source is AVX2 at VL = 8 and AVX-512 at VL = 16.
// Included inside the namespace of one ISA level, below its target pragma; includes nothing itself.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

typedef float vf __attribute__((vector_size(VL * 4), may_alias, aligned(4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4), may_alias, aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias, aligned(4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2), may_alias, aligned(2)));

INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
INLINE vu load_bits(const void* p) { return *reinterpret_cast<const vu*>(p); }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
INLINE float max1(float a, float b) { return a > b ? a : b; }
INLINE float min1(float a, float b) { return a < b ? a : b; }
INLINE int64_t min1(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max1(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two bf16 in each 32-bit lane: the element at the lower address, and the one after it. No shuffle, unlike widening.
INLINE vf even(vu pair) { return (vf)(pair << 16); }
INLINE vf odd(vu pair) { return (vf)(pair & 0xffff0000u); }

// The same, with the mask read from memory each time: for loops that need all 16 registers of AVX2.
INLINE vf odd_lean(vu pair) {
#if VL == 8
  static const vu mask = (vu){} + 0xffff0000u;
  asm("vpand %1, %0, %0" : "+x"(pair) : "m"(mask));
  return (vf)pair;
#else
  return odd(pair);
#endif
}

// sum += a * b, in place: left to itself the compiler writes some sums over an operand, and spills them.
INLINE void accumulate(vf& sum, vf a, vf b) {
#ifdef EMULATE_AVX512
  sum += a * b;
#else
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
}

#ifdef HAS_DOT_BF16
// sum += the dot product of the bf16 pair x with the pair in each lane of w.
INLINE void accumulate_pairs(vf& sum, vu w, uint32_t x) {
#ifdef EMULATE_AVX512
  vu pair = (vu){} + x;
  sum += odd(w) * odd(pair);
  sum += even(w) * even(pair);
#else
  sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)w);
#endif
}
#endif

INLINE float to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays one.
INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE vu round_bf16(vf x) {
  vu bits = (vu)x;
  vu rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (x == x ? rounded : (bits | 0x400000)) >> 16;
}

INLINE vf load_bf16(const uint16_t* p) { return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16); }
INLINE void store_bf16(uint16_t* p, vf x) { *reinterpret_cast<vh*>(p) = __builtin_convertvector(round_bf16(x), vh); }

INLINE vf load(const uint16_t* p) { return load_bf16(p); }
INLINE void store(uint16_t* p, vf x) { store_bf16(p, x); }
INLINE float load1(const float* p) { return *p; }
INLINE float load1(const uint16_t* p) { return to_float(*p); }
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(uint16_t* p, float x) { *p = to_bf16(x); }
INLINE float load1(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f16) return float(static_cast<const _Float16*>(p)[i]);
  return dtype == DType::f32 ? static_cast<const float*>(p)[i] : to_float(static_cast<const uint16_t*>(p)[i]);
}

// x with its lanes `distance` apart exchanged.
template <int Distance>
INLINE vf exchange(vf x) {
  vi lanes;
  UNROLL for (int i = 0; i < VL; ++i) lanes[i] = i ^ Distance;
  return __builtin_shuffle(x, lanes);
}

INLINE float sum(vf x) {
#if VL == 16
  x += exchange<8>(x);
#endif
  x += exchange<4>(x);
  x += exchange<2>(x);
  x += exchange<1>(x);
  return x[0];
}

INLINE float max_lane(vf x) {
#if VL == 16
  x = max(x, exchange<8>(x));
#endif
  x = max(x, exchange<4>(x));
  x = max(x, exchange<2>(x));
  x = max(x, exchange<1>(x));
  return x[0];
}

// e^x to about 2 units in the last place; 0 below -87.3, and so for -inf.
INLINE vf exp(vf x) {
  vf low = splat(-87.3f);
  vf clamped = min(max(x, low), splat(88.7f));
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low mantissa bits
  vf shifted = clamped * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf y = (vf)((vi)p + ((vi)shifted << 23));
  return x < low ? (vf){} : y;
}

INLINE vf tanh(vf x) {
  vf magnitude = (vf)((vu)x & 0x7fffffffu);
  vf e = exp(magnitude * -2.0f);
  vf y = (1.0f - e) / (1.0f + e);
  return (vf)((vu)y | ((vu)x & 0x80000000u));
}
