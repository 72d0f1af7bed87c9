// Every kernel of one ISA level. The including file has set the target, VL and KERNELS, and included isa.h and parallel.h
// before it raised the target: a standard header read under it could leave code that other CPUs cannot run.

namespace sglang_xeon {
namespace {
#include "simd.inl"
//
#include "gemm.inl"
//
#include "attention.inl"
//
#include "rows.inl"
//
#include "collectives.inl"
}  // namespace

extern const Kernels KERNELS = {KERNELS_NAME, linear, pack, attention, kv_write, norm, gated, rope, argmax, sum_parts};
}  // namespace sglang_xeon
