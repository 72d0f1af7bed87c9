"""FlashInfer as a provider of its own, as facts: `--kernel attn.paged=flashinfer`. Imports neither it nor torch.

Its prefill serves steps of their own shapes; steps that are captured as graphs are Triton's. Its wrappers keep what they plan in buffers of their own,
and a graph would read the next step's while the last one runs.
"""

from __future__ import annotations

from sglang_triton.kernels import DTYPES, GRAPHS

from sglang_core.api import Kernel, SelectionContext
from sglang_cuda.optional import problem

PACKAGE, RELEASES = "flashinfer-python", ">=0.7.2,<0.8"
ABOVE_TRITON = 45  # whose tiles are for every GPU; below what is ours
HEAD_DIMS = (64, 128, 256)


def kernels() -> list[Kernel]:
    missing = problem(PACKAGE, RELEASES)

    def attention(ctx: SelectionContext) -> str | None:
        return missing or attention_limits(ctx)

    def write(ctx: SelectionContext) -> str | None:
        return missing or (None if ctx.site.dtype in DTYPES else f"takes no {ctx.site.dtype}")

    module = "sglang_cuda.flashinfer_kernels"
    listed = {
        "attn.paged": (f"{module}:paged", attention),
        "attn.plan": (f"{module}:plan", attention),
        "kv.write": ("sglang_triton.kv_write:kv_write", write),
    }
    return [
        Kernel(
            op,
            provider="flashinfer",
            fn=fn,
            device=("cuda",),
            priority=ABOVE_TRITON,
            supports=supports,
            features=GRAPHS,
        )
        for op, (fn, supports) in listed.items()
    ]


def attention_limits(ctx: SelectionContext) -> str | None:
    """Its masks multiply values by zero: outside a window lie freed pages, whose slots may hold NaN."""
    spec = ctx.site.spec
    if ctx.site.dtype != "bfloat16" or spec.kv_dtype not in ("auto", "bfloat16"):
        return f"is called in bfloat16 alone, not on {ctx.site.dtype} with keys in {spec.kv_dtype}"
    if spec.head_dim != spec.v_head_dim or spec.head_dim not in HEAD_DIMS:
        return f"is called for heads of {', '.join(map(str, HEAD_DIMS))}, not {spec.head_dim} and {spec.v_head_dim}"
    unknown = {
        "windows": spec.window,
        "sinks": spec.has_sinks,
        "trees of drafts": spec.tree,
        "cross attention": spec.cross,
    }
    found = [name for name, there in unknown.items() if there]
    return f"is not called for {', '.join(found)}" if found else None
