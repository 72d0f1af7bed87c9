"""`XeonBackend`: any x86-64 host CPU with AVX2. Importing it reads no device and imports no torch."""

from __future__ import annotations

import os
import platform
from typing import Any

from sglang_core.api import (
    Backend,
    Claim,
    Claims,
    DefaultsContext,
    DeviceInfo,
    DeviceRuntime,
    Kernel,
    KernelContext,
    RuntimeContext,
    SelectionContext,
    Support,
)
from sglang_xeon import ipex, isa

DTYPES = ("bfloat16", "float32")
LINEAR_DTYPES = (*DTYPES, "float16")  # and weights in every format
# For --device auto: above the reference backend (0), below every accelerator (100 and up).
SCORES = {"avx2": 30, "avx512": 40, "avx512_bf16": 50, "amx": 60}
# The bytes that weights.pack makes. A change of them is a new number: packed caches go by it.
PACKED_LAYOUT = "xeon.panels/3"
EXPERT_OPS = ("moe.fused", "gemm.grouped")
ACT_ORDER = tuple(f"int4.gptq.g{group}.act_order" for group in (32, 64, 128, -1))
PROFILES = (
    *("base", "serving", "mla", "moe", "vision", "graph", "comm", "e2e"),
    *("window", "soft_cap", "sinks", "tree", "cross", "kv_half", "kv_fp8", "kv_int8", "odd_sizes", "buckets"),
    *(f"quant:{fmt}" for fmt in ("fp8.token_channel", "fp8.block128", "int8.token_channel", "mxfp4.g32", "nvfp4.g16")),
    *(f"quant:int4.{fmt}" for fmt in ("awq.g128", "gptq.g64", "pack.g128")),
)
INVARIANT = frozenset({"batch_invariant"})  # a row's result does not depend on its neighbours
INVARIANT_PRIORITY = 49  # below the default: of kernels that are there for --deterministic


def dtype_limits(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in DTYPES else f"takes {' and '.join(DTYPES)}, not {ctx.site.dtype}"


def linear_limits(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in LINEAR_DTYPES else f"takes {', '.join(LINEAR_DTYPES)}, not {ctx.site.dtype}"


def expert_limits(ctx: SelectionContext) -> str | None:
    if ctx.site.fmt in ACT_ORDER:
        return f"takes no experts that each have an order of columns of their own ({ctx.site.fmt})"
    return dtype_limits(ctx)


def latent_limits(ctx: SelectionContext) -> str | None:
    rank = getattr(ctx.site.spec, "rank", 0)
    return f"takes latents of an even rank, not {rank}" if rank % 2 else dtype_limits(ctx)


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    defaults: dict[str, Any] = {"device": ("xeon",), "supports": dtype_limits, "features": INVARIANT}
    return Kernel(op, fn=f"sglang_xeon.{fn}", **(defaults | facts))


class XeonBackend(Backend):
    """One device: the host's cores, as one."""

    name = "xeon"

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return True

    def probe(self) -> list[DeviceInfo]:
        cpuinfo = isa.read_cpuinfo()
        found = isa.detect(cpuinfo, platform.machine())
        if found is None:
            return []
        try:
            level = isa.active(found)
        except Exception:  # probe never raises: a malformed SGLANG_XEON_ISA is reported when the device is opened
            level = found
        info = DeviceInfo(
            backend=self.name,
            path=f"xeon/{level}",
            name=isa.cpu_name(cpuinfo),
            score=SCORES[level],
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            facts={"isa": level, "isa_of_cpu": found},
            versions={platform.system(): platform.release()},
        )
        return [info]

    def absent_reason(self) -> str:
        return "it needs an x86-64 CPU with AVX2 and FMA, and /proc/cpuinfo shows none; take --device cpu"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        isa.active(str(ctx.devices[0].facts.get("isa_of_cpu", "avx2")))  # raises where SGLANG_XEON_ISA is malformed
        from sglang_xeon.runtime import XeonRuntime  # torch: not needed to list devices

        return XeonRuntime(ctx)

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        coded = isa.codes_exponents(str(ctx.device.facts.get("isa", "avx2")))
        layout = f"{PACKED_LAYOUT}, {'coded' if coded else 'plain'} bfloat16"
        packing: dict[str, Any] = {"supports": linear_limits, "packed_layout": layout}
        packing |= {"pack": "sglang_xeon.gemm:pack", "unpack": "sglang_xeon.gemm:unpack"}
        experts: dict[str, Any] = {"supports": expert_limits, "packed_layout": layout}
        experts |= {"pack": "sglang_xeon.moe:pack", "unpack": "sglang_xeon.moe:unpack"}
        return [
            _kernel("gemm.linear", "gemm:linear", **packing),
            # Not invariant: AMX tiles, from some number of rows on, sum in another order.
            _kernel("gemm.linear", "gemm:linear_amx", device=("xeon/amx",), **(packing | {"features": frozenset()})),
            _kernel("gemm.linear_gated", "gemm:linear_gated", **(packing | {"supports": dtype_limits})),
            _kernel(
                "gemm.linear_gated",
                "gemm:linear_gated_amx",
                device=("xeon/amx",),
                **(packing | {"supports": dtype_limits, "features": frozenset()}),
            ),
            # Not invariant: with this plan, keys that reqs share are visited once for all of them. --deterministic takes the other.
            _kernel("attn.paged", "attention:paged", features=frozenset()),
            _kernel("attn.paged", "attention:paged", priority=INVARIANT_PRIORITY),
            _kernel("attn.plan", "attention_plan:plan", features=frozenset()),
            _kernel("attn.plan", "attention_plan:plan_invariant", priority=INVARIANT_PRIORITY),
            _kernel("attn.rope_paged", "rope_paged:rope_paged", features=frozenset()),
            _kernel("attn.rope_paged", "rope_paged:rope_paged", priority=INVARIANT_PRIORITY),
            _kernel("kv.write", "attention:kv_write"),
            _kernel("attn.mla_paged", "attention:mla_paged", supports=latent_limits, features=frozenset()),
            _kernel("attn.mla_paged", "attention:mla_paged", supports=latent_limits, priority=INVARIANT_PRIORITY),
            _kernel("attn.mla_plan", "attention_plan:plan", supports=latent_limits, features=frozenset()),
            _kernel(
                "attn.mla_plan", "attention_plan:plan_invariant", supports=latent_limits, priority=INVARIANT_PRIORITY
            ),
            _kernel("kv.write_mla", "attention:kv_write", supports=latent_limits),
            _kernel("attn.ragged", "attention:ragged"),
            _kernel("attn.merge", "attention:merge"),
            _kernel("norm.rms", "norm:rms_norm"),
            _kernel("norm.rms_gated", "norm:rms_norm_gated"),
            _kernel("norm.add_rms", "norm:add_rms_norm"),
            _kernel("norm.layer", "norm:layer_norm"),
            _kernel("rope.apply", "rope:rope_apply"),
            _kernel("act.gated", "activation:gated"),
            _kernel("embed.lookup", "embedding:embed_lookup"),
            _kernel("sample.sample", "sampling:sample"),
            _kernel("logits.mask", "logits:mask"),
            _kernel("logits.adjust", "logits:adjust"),
            _kernel("logits.soft_cap", "logits:soft_cap"),
            _kernel("lora.apply", "lora:apply"),
            _kernel("moe.route", "moe:route"),
            _kernel("moe.fused", "moe:fused", **experts),
            _kernel("gemm.grouped", "moe:grouped", **experts),
            _kernel("moe.fused", "moe:fused_amx", device=("xeon/amx",), **(experts | {"features": frozenset()})),
            _kernel("gemm.grouped", "moe:grouped_amx", device=("xeon/amx",), **(experts | {"features": frozenset()})),
            *ipex.kernels(dtype_limits),
        ]

    def claims(self, ctx: KernelContext) -> Claims:
        """What `kernels` brings, in float32 and bfloat16; linear layers in float16 too, which overflows in other bodies."""
        unsupported = Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)
        ops = dict.fromkeys(kernel.op for kernel in self.kernels(ctx))
        bodies = [Claim(op=op, formats=ACT_ORDER, support=Support.REFERENCE) for op in EXPERT_OPS]
        linear = Claim(op="gemm.linear", dtypes=LINEAR_DTYPES)
        native = [Claim(op=op, dtypes=DTYPES) for op in ops if op != "gemm.linear"]
        return Claims((linear, unsupported, *bodies, *native), profiles=PROFILES)

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """bfloat16 halves the bytes a decode step streams; pages of 16 keep prefix reuse fine-grained at no cost here.

        A chunk of 512 tokens already runs at full GEMM speed, and keeps the steps that decoding reqs wait for short.
        """
        return {"dtype": "bfloat16", "page_size": 16, "chunked_prefill_size": 512}
