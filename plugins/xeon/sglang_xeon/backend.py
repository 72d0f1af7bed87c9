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
from sglang_xeon import isa

DTYPES = ("bfloat16", "float32")
# For --device auto: above the reference backend (0), below every accelerator (100 and up).
SCORES = {"avx2": 30, "avx512": 40, "avx512_bf16": 50, "amx": 60}
PROFILES = ("base", "serving", "graph", "comm", "e2e", "window", "soft_cap", "sinks", "cross", "odd_sizes", "buckets")
INVARIANT = frozenset({"batch_invariant"})  # a row's result does not depend on its neighbours


def dtype_limits(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in DTYPES else f"takes {' and '.join(DTYPES)}, not {ctx.site.dtype}"


def dense_only(ctx: SelectionContext) -> str | None:
    if ctx.site.fmt != "dense":
        return f"takes dense weights, not {ctx.site.fmt}"
    return dtype_limits(ctx)


def attention_limits(ctx: SelectionContext) -> str | None:
    kv_dtype = getattr(ctx.site.spec, "kv_dtype", "auto")
    if kv_dtype not in ("auto", *DTYPES):
        return f"reads {' and '.join(DTYPES)} pools, not {kv_dtype} (--kv-cache-dtype)"
    if getattr(ctx.site.spec, "tree", False):
        return "takes no tree masks"
    return dtype_limits(ctx)


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    defaults: dict[str, Any] = {"device": ("xeon",), "supports": dtype_limits, "features": INVARIANT}
    return Kernel(op, fn=f"sglang_xeon.{fn}", **(defaults | facts))


class XeonBackend(Backend):
    """One device: the host's cores, as one."""

    name = "xeon"

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
        packing = {"supports": dense_only, "pack": "sglang_xeon.gemm:pack", "unpack": "sglang_xeon.gemm:unpack"}
        return [
            _kernel("gemm.linear", "gemm:linear", **packing),
            # Not invariant: oneDNN takes over from some number of rows on.
            _kernel("gemm.linear", "gemm:linear_amx", device=("xeon/amx",), **(packing | {"features": frozenset()})),
            _kernel("attn.paged", "attention:paged", supports=attention_limits),
            _kernel("attn.plan", "attention:plan", supports=attention_limits),
            _kernel("kv.write", "attention:kv_write", supports=attention_limits),
            _kernel("norm.rms", "norm:rms_norm"),
            _kernel("norm.add_rms", "norm:add_rms_norm"),
            _kernel("rope.apply", "rope:rope_apply"),
            _kernel("act.gated", "activation:gated"),
            _kernel("embed.lookup", "embedding:embed_lookup"),
            _kernel("sample.sample", "sampling:sample"),
        ]

    def claims(self, ctx: KernelContext) -> Claims:
        """What `kernels` brings, in float32 and bfloat16. Float16 overflows in bodies never checked with it."""
        unsupported = Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)
        ops = dict.fromkeys(kernel.op for kernel in self.kernels(ctx))
        native = [Claim(op=op, dtypes=DTYPES, formats=("dense",) if op == "gemm.linear" else ("*",)) for op in ops]
        return Claims((unsupported, *native), profiles=PROFILES)

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """bfloat16 halves the bytes a decode step streams; pages of 16 keep prefix reuse fine-grained at no cost here.

        A chunk of 512 tokens already runs at full GEMM speed, and keeps the steps that decoding reqs wait for short.
        """
        return {"dtype": "bfloat16", "page_size": 16, "chunked_prefill_size": 512}
