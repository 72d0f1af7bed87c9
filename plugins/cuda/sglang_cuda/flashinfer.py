"""FlashInfer as a provider of its own, as facts: `--kernel attn.paged=flashinfer`. Imports neither it nor torch.

Its prefill serves steps of their own shapes; steps that are captured as graphs are Triton's. Its wrappers keep what they plan in buffers of their own,
and a graph would read the next step's while the last one runs.
"""

from __future__ import annotations

from sglang_triton.gpu.optional import paged_attention, plain_heads, problem

from sglang_core.api import Kernel, SelectionContext

PACKAGE, RELEASES = "flashinfer-python", ">=0.7.2,<0.8"
ABOVE_TRITON = 45  # whose tiles are for every GPU; below what is ours
HEAD_DIMS = (64, 128, 256)


def kernels() -> list[Kernel]:
    return paged_attention(
        "flashinfer",
        "sglang_cuda.flashinfer_kernels",
        "cuda",
        missing=problem(PACKAGE, RELEASES),
        limits=attention_limits,
        priority=ABOVE_TRITON,
    )


def attention_limits(ctx: SelectionContext) -> str | None:
    """Its masks multiply values by zero: outside a window lie freed pages, whose slots may hold NaN."""
    spec = ctx.site.spec
    if ctx.site.dtype != "bfloat16" or spec.kv_dtype not in ("auto", "bfloat16"):
        return f"is called in bfloat16 alone, not on {ctx.site.dtype} with keys in {spec.kv_dtype}"
    return plain_heads(ctx, HEAD_DIMS)
