#include <immintrin.h>

#include "exponents.h"
#include "isa.h"
#include "parallel.h"
#include "select.h"

#ifdef EMULATE_AVX512  // tests only: the same code on pairs of 256-bit registers
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define VL 16
#define KERNELS kernels_avx512
#define KERNELS_NAME "avx512"
#include "kernels.inl"
