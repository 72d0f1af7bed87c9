// The library itself: the ISA level that its kernels run at, and its threads. The ops are in bind_*.cpp.

#include <sched.h>

#include <atomic>
#include <string>

#include "bindings.h"
#include "parallel.h"

namespace sglang_xeon {

int64_t default_num_threads() { return torch::stable::get_num_threads(); }

namespace {

Kernels make_avx512_bf16() {
  Kernels kernels = kernels_avx512;
  kernels.name = "avx512_bf16";
  kernels.linear = [](const LinearArgs& args) {
    if (dots_pairs(args))
      linear_avx512_bf16(args);
    else
      kernels_avx512.linear(args);
  };
  kernels.experts = [](const ExpertsArgs& args) {
    bool dots = dots_pairs(args.x.dtype, args.w13.first, args.w13.quantize) && dots_pairs(args.x.dtype, args.w2.first, args.w2.quantize);
    (dots ? experts_avx512_bf16 : kernels_avx512.experts)(args);
  };
  kernels.grouped = [](const GroupedArgs& args) {
    (dots_pairs(args.x.dtype, args.w.first, args.w.quantize) ? grouped_avx512_bf16 : kernels_avx512.grouped)(args);
  };
  // Products of bfloat16 are exact, and so are fp8 and int8 codes in it; float16 keys are not.
  kernels.attention = [](const AttentionArgs& args) {
    if (args.q.dtype == DType::bf16 && args.kv_dtype != KvDType::f32 && args.kv_dtype != KvDType::f16)
      attention_avx512_bf16(args);
    else
      kernels_avx512.attention(args);
  };
  return kernels;
}

Kernels make_amx(Kernels kernels) {
  kernels.name = "amx";
  kernels.tiles = &kTileKernels;
  return kernels;
}

const Kernels* active = nullptr;

// `isa`: avx2, avx512, avx512_bf16 or amx. The caller has seen that this CPU has it.
void set_isa(std::string isa) {
  static const Kernels avx512_bf16 = make_avx512_bf16(), amx = make_amx(avx512_bf16);
  const Kernels* all[] = {&kernels_avx2, &kernels_avx512, &avx512_bf16, &amx};
  STD_TORCH_CHECK(
      isa != amx.name || allow_tiles(), "sglang_xeon: the operating system refuses AMX tiles; set SGLANG_XEON_ISA=avx512_bf16");
  for (const Kernels* kernels : all)
    if (isa == kernels->name) {
      active = kernels;
      return;
    }
  STD_TORCH_CHECK(false, "sglang_xeon: no kernels for ISA '", isa, "'");
}

// Ties the calling thread to cpus[0] and thread i of its team, and of torch's pool as seen from it, to cpus[i]. Returns how
// many of torch's were tied. They exist before the caller ties itself, so none inherits its mask.
int64_t pin_threads(std::vector<int64_t> cpus) {
  int64_t threads = std::min<int64_t>(default_num_threads(), int64_t(cpus.size()));
  std::atomic<int64_t> tied{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (end - begin != 1) return;  // fewer threads than asked for: leave them free
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(size_t(cpus[size_t(begin)]), &mask);
    if (sched_setaffinity(0, sizeof(mask), &mask) == 0) tied.fetch_add(1);
  });
  pin_team(cpus.data(), int64_t(cpus.size()));
  return tied.load();
}

}  // namespace

const Kernels& kernels() {
  STD_TORCH_CHECK(active != nullptr, "sglang_xeon: set_isa has not been called");
  return noted_kernels(*active);
}

// No tensor says where these belong, so they answer for every key.
STABLE_TORCH_LIBRARY(sglang_xeon, m) {
  m.def("set_isa(str isa) -> ()");
  m.def("pin_threads(int[] cpus) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sglang_xeon, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("pin_threads", TORCH_BOX(&pin_threads));
}

}  // namespace sglang_xeon
