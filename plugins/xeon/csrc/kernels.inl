// Every kernel of one ISA level. The including file has set the target, VL and KERNELS, and included isa.h and parallel.h
// before it raised the target: a standard header read under it could leave code that other CPUs cannot run.

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
#include "pack.inl"
//
#include "grouped.inl"
//
#include "moe.inl"
//
#include "kv_elements.inl"
//
#include "kv_write.inl"
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
//
#include "attention_merge.inl"
//
#include "rows.inl"
//
#include "rope_write.inl"
//
#include "lora.inl"
//
#include "route.inl"
//
#include "sampling.inl"
//
#include "logits.inl"
//
#include "collectives.inl"
}  // namespace

extern const Kernels KERNELS = {
    KERNELS_NAME, linear, pack, attention, kv_write, rope_write, merge, norm, gated, rope, argmax, experts, grouped, route, lora, sample, mask, adjust,
    soft_cap, layer_norm, embed, sum_parts};
}  // namespace sglang_xeon
