"""AITER as a provider of its own, as facts: `--kernel attn.paged=aiter`, `--kernel attn.ragged=aiter`. Imports neither it nor torch.

Its attention over packed rows is called where it is a kernel made for the chip: bfloat16, heads of 128, or of 192 with values of 128, no window and no
soft cap. Its other functions are not called; docs/backends/gpu.md says why not, of each.
"""

from __future__ import annotations

from math import isclose

from sglang_triton.gpu.optional import paged_attention, plain_heads, problem

from sglang_core.api import Kernel, SelectionContext

PACKAGE, RELEASES, SOURCE = "amd-aiter", ">=0.1.21,<0.1.23", "https://github.com/ROCm/aiter/releases"
ABOVE_TRITON = 45
LATENT = (192, 128)  # of latents, expanded
HEADS = ((128, 128), LATENT)
PAGED = (128,)
OWN_SCALE = "rocm/gfx950"


def missing() -> str:
    """Why it cannot be used: "" or a reason."""
    return problem(PACKAGE, RELEASES, SOURCE)


def kernels() -> list[Kernel]:
    absent = missing()

    def supports(ctx: SelectionContext) -> str | None:
        return absent or limits(ctx)

    fn = "sglang_rocm.aiter_attention:ragged"
    packed = Kernel("attn.ragged", provider="aiter", fn=fn, device=("rocm",), priority=ABOVE_TRITON, supports=supports)
    module = "sglang_rocm.aiter_paged"
    return [
        packed,
        *paged_attention("aiter", module, "rocm", missing=absent, limits=paged_limits, priority=ABOVE_TRITON),
    ]


def limits(ctx: SelectionContext) -> str | None:
    """On CDNA 4 some of the releases scale heads of 192 by the root of 192, whatever they are told to."""
    spec, heads = ctx.site.spec, (ctx.site.spec.head_dim, ctx.site.spec.v_head_dim)
    if ctx.site.dtype != "bfloat16":
        return f"is called in bfloat16, not {ctx.site.dtype}"
    if heads not in HEADS:
        return f"is called for heads of {' or '.join(f'{k} with values of {v}' for k, v in HEADS)}, not {heads[0]} and {heads[1]}"
    if found := [name for name, there in (("windows", spec.window), ("soft caps", spec.soft_cap)) if there]:
        return f"is not called for {', '.join(found)}"
    if heads == LATENT and ctx.device.path == OWN_SCALE and not isclose(spec.scale, heads[0] ** -0.5, rel_tol=1e-6):
        return f"scales heads of {heads[0]} by {heads[0] ** -0.5:.6f} on {OWN_SCALE}, whatever is asked for; this is {spec.scale:.6f}"
    return None


def paged_limits(ctx: SelectionContext) -> str | None:
    """Keys are copied out of the pool as they are."""
    if reason := plain_heads(ctx, PAGED) or limits(ctx):
        return reason
    kept = ctx.site.spec.kv_dtype
    return None if kept in ("auto", ctx.site.dtype) else f"is not called for keys in {kept}"
