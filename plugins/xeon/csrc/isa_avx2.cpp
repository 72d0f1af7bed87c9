#include <immintrin.h>

#include "exponents.h"
#include "isa.h"
#include "parallel.h"
#include "select.h"

#pragma GCC target("avx2,fma,f16c")
#define VL 8
#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#include "kernels.inl"
