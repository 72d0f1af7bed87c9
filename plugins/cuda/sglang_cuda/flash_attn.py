"""FlashAttention-2 as a provider of its own, as facts: `--kernel attn.ragged=flash_attn`. Imports neither it nor torch.

Its paged cache has pages of 256 tokens and more, which is nobody's page size here, so it is for packed rows.
"""

from __future__ import annotations

from sglang_triton.gpu.optional import problem
from sglang_triton.kernels import GRAPHS

from sglang_core.api import Kernel, SelectionContext
from sglang_cuda.linears import architecture

PACKAGE, RELEASES = "flash-attn", ">=2.8.3,<2.9"
ABOVE_TRITON = 45
HOPPER = 90
WIDEST = 256
UNIT = 8  # numbers of 16 bits in 16 bytes; other heads it would pad, in copies


def kernels() -> list[Kernel]:
    missing = problem(PACKAGE, RELEASES)

    def supports(ctx: SelectionContext) -> str | None:
        return missing or limits(ctx)

    fn = "sglang_cuda.flash_attn_kernels:ragged"
    return [
        Kernel(
            "attn.ragged",
            provider="flash_attn",
            fn=fn,
            device=("cuda",),
            priority=ABOVE_TRITON,
            supports=supports,
            features=GRAPHS,
        )
    ]


def limits(ctx: SelectionContext) -> str | None:
    """On Hopper and later its instructions run at about half the rate of the tensor cores, and Triton's are others."""
    spec, dtype = ctx.site.spec, ctx.site.dtype
    if (found := architecture(ctx)) >= HOPPER:
        return f"is called before sm_{HOPPER}, whose instructions it consists of; this is sm_{found}"
    if dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {dtype}"
    if spec.head_dim != spec.v_head_dim or spec.head_dim % UNIT or spec.head_dim > WIDEST:
        return f"is called for heads of a multiple of {UNIT} up to {WIDEST}, not {spec.head_dim} and {spec.v_head_dim}"
    return None
