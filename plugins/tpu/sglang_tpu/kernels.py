"""Which kernels there are, as facts. Imports neither torch nor jax: a kernel's module is imported once it is chosen."""

from __future__ import annotations

from sglang_core.api import Claim, Claims, Kernel, SelectionContext, Support

DTYPES = ("bfloat16", "float32")
GRAPHS = frozenset({"graph_safe"})
LANE_LAYOUT = "tpu.lanes"

TRACED = {
    "norm.rms": "norm_rms",
    "norm.add_rms": "norm_add_rms",
    "norm.layer": "norm_layer",
    "rope.apply": "rope_apply",
    "act.gated": "act_gated",
    "embed.lookup": "embed_lookup",
    "logits.soft_cap": "logits_soft_cap",
    "logits.mask": "logits_mask",
    "logits.adjust": "logits_adjust",
    "sample.sample": "sample",
    "moe.route": "moe_route",
}

KERNELS = [Kernel(op, fn=f"sglang_tpu.traced:{name}", device=("tpu",), features=GRAPHS) for op, name in TRACED.items()]


ATTENTION = {
    "attn.paged": "attention:paged",
    "attn.plan": "attention_plan:plan",
    "kv.write": "attention:kv_write",
    "attn.mla_paged": "attention:mla_paged",
    "attn.mla_plan": "attention_plan:plan",
    "kv.write_mla": "attention:kv_write_mla",
}


def attention_limits(ctx: SelectionContext) -> str | None:
    spec, heads = ctx.site.spec, ctx.site.dims.get("Hk", 1)
    if spec.tree:
        return "takes no tree mask"
    if spec.kv_dtype not in ("auto", ctx.site.dtype):
        return f"reads pools in the dtype of the activations, not {spec.kv_dtype}"
    if ctx.device.facts.get("emulated"):
        return None
    # Else XLA keeps the pool in another order than the kernel reads, and would turn it around in every step.
    if ctx.site.dtype != "bfloat16":
        return f"takes bfloat16 on a TPU, not {ctx.site.dtype}"
    if heads != 1 and heads & (heads - 1):
        return f"takes a power of two of KV heads a rank, not {heads}"
    return None if ctx.page_size % 16 == 0 else f"takes pages of a multiple of 16 tokens, not {ctx.page_size}"


KERNELS += [
    Kernel(
        op,
        fn=f"sglang_tpu.{fn}",
        device=("tpu",),
        features=GRAPHS,
        supports=attention_limits,
        kv_layouts=(LANE_LAYOUT,),
    )
    for op, fn in ATTENTION.items()
]


def claims(profiles: tuple[str, ...]) -> Claims:
    """Of the other ops only float16 is refused, which their bodies were never checked with."""
    native = [Claim(op=op, dtypes=DTYPES) for op in (*TRACED, *ATTENTION)]
    return Claims((*native, Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)), profiles=profiles)
