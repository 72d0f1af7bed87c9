"""Provider `jax`: the Pallas kernels that come with jax, as facts. Nothing of jax is imported until one is chosen, as with `--kernel attn.paged=jax`.

They rank below ours: they are here to be measured against, and for what jax tunes before we do.
"""

from __future__ import annotations

from typing import Any

from sglang_core.api import Kernel, SelectionContext
from sglang_tpu.kernels import DTYPES, GRAPHS, dense_limits

PROVIDER = "jax"
INTERLEAVED = "jax.interleaved"
LANES = 128
IN_HALF = "takes bfloat16 on a TPU: it multiplies float32 as bfloat16 there"
PACKING = {"bfloat16": 2, "float32": 1}  # rows of a tile's 32-bit word
ATTENTION = {"attn.paged": "paged", "attn.plan": "plan", "kv.write": "kv_write"}


def attention_limits(ctx: SelectionContext) -> str | None:
    """What ragged_paged_attention does not know, or what its own checks would raise while a step is traced."""
    spec, dtype, emulated = ctx.site.spec, ctx.site.dtype, ctx.device.facts.get("emulated")
    if dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {dtype}"
    unknown = {
        "tree masks": spec.tree,
        "sinks": spec.has_sinks,
        "attention that is not causal": not spec.causal,
        # It masks what is before a window once it has read it: pages that are another req's by then, or scratch, where NaN may be.
        "windows, whose pages before them must not be read": spec.window is not None,
    }
    if known := [what for what, asked in unknown.items() if asked]:
        return f"knows no {' and no '.join(known)}"
    if spec.kv_dtype not in ("auto", dtype):
        return f"reads pools in the dtype of the activations, not {spec.kv_dtype}"
    if dtype == "float32" and not emulated:
        return IN_HALF
    words = 2 * spec.num_kv_heads // PACKING[dtype]
    if words % 8 and words not in (1, 2, 4):
        return f"keys and values of {spec.num_kv_heads} heads in {dtype} are {words} rows of words; it takes 1, 2, 4 or multiples of 8"
    if emulated:
        return None
    if (dim := max(spec.head_dim, spec.v_head_dim)) > LANES:
        return f"takes heads of {LANES} numbers or fewer on a TPU, not {dim}: Mosaic has no strided load of longer rows"
    if ctx.page_size % 16:
        return f"takes pages of a multiple of 16 tokens, not {ctx.page_size}"
    return None


def expert_limits(ctx: SelectionContext) -> str | None:
    """What megablox does not take."""
    if ctx.site.dtype == "float32" and not ctx.device.facts.get("emulated"):
        return IN_HALF
    return dense_limits(ctx)


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    return Kernel(op, PROVIDER, fn=f"sglang_tpu.{fn}", device=("tpu",), priority=20, features=GRAPHS, **facts)


KERNELS = [
    *(
        _kernel(op, f"jax_attention:{name}", supports=attention_limits, kv_layouts=(INTERLEAVED,))
        for op, name in ATTENTION.items()
    ),
    _kernel("gemm.grouped", "jax_experts:grouped", supports=expert_limits),
    _kernel("moe.fused", "jax_experts:fused", supports=expert_limits),
]
