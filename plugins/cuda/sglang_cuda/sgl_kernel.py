"""sgl-kernel as a provider of its own, as facts: `--kernel attn.paged=sgl_kernel`. Imports neither it nor torch.

It brings FlashAttention-3, which reads all that changes from step to step on the device: its steps may be graphs.
"""

from __future__ import annotations

from sglang_triton.gpu.optional import paged_attention, plain_heads, problem

from sglang_core.api import Kernel, SelectionContext

PACKAGE, RELEASES = "sgl-kernel", ">=0.3.21,<0.3.22"
ABOVE_FLASHINFER = 46  # made for Hopper
HOPPER = "cuda/sm_90"
HEAD_DIMS = (64, 128, 256)
# Pages as long as its blocks of keys, which have 64 and more, are copied whole; what nobody wrote in them may be NaN, and is multiplied by zero.
LONGEST_PAGE = 32


def kernels() -> list[Kernel]:
    return paged_attention(
        "sgl_kernel",
        "sglang_cuda.sgl_kernel_attention",
        "cuda",
        missing=problem(PACKAGE, RELEASES),
        limits=attention_limits,
        priority=ABOVE_FLASHINFER,
    )


def attention_limits(ctx: SelectionContext) -> str | None:
    """Freed pages outside a window may hold NaN, and its masks multiply values by zero; a req without keys gets an lse of +inf."""
    spec, dtype = ctx.site.spec, ctx.site.dtype
    if ctx.device.path != HOPPER:
        return f"is called on {HOPPER}, not on {ctx.device.path}"
    if dtype not in ("bfloat16", "float16") or spec.kv_dtype not in ("auto", dtype):
        return f"is called in bfloat16 and float16, not on {dtype} with keys in {spec.kv_dtype}"
    if ctx.page_size > LONGEST_PAGE:
        return f"is called for pages of at most {LONGEST_PAGE}, not {ctx.page_size}; set --page-size"
    return plain_heads(ctx, HEAD_DIMS)
