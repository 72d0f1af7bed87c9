#include <immintrin.h>

#include "exponents.h"
#include "isa.h"
#include "parallel.h"
#include "select.h"

#ifdef EMULATE_AVX512  // tests only: the same code on pairs of 256-bit registers
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define VL 16
#define HAS_DOT_BF16

namespace sglang_xeon {
namespace {
#include "simd.inl"
//
#include "gate.inl"
//
#include "gemm.inl"
//
#include "codes.inl"
//
#include "activations.inl"
//
#include "gemm_int8.inl"
//
#include "linear.inl"
//
#include "grouped.inl"
//
#include "moe.inl"
//
#include "kv_elements.inl"
//
#include "attention_softmax.inl"
//
#include "attention_direct.inl"
//
#include "attention_tiled.inl"
//
#include "attention_shared.inl"
//
#include "attention.inl"
}  // namespace

void linear_avx512_bf16(const LinearArgs& args) { linear(args); }
void experts_avx512_bf16(const ExpertsArgs& args) { experts(args); }
void grouped_avx512_bf16(const GroupedArgs& args) { grouped(args); }
void attention_avx512_bf16(const AttentionArgs& args) { attention(args); }
}  // namespace sglang_xeon
