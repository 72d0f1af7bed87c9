"""Which kernels there are, as facts. Imports neither torch nor jax: a kernel's module is imported once it is chosen."""

from __future__ import annotations

from typing import Any

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
    "ssm.causal_conv1d": "causal_conv1d",
    "ssm.gated_delta_rule": "gated_delta_rule",
    "lora.apply": "lora_apply",
    "lora.embed": "lora_embed",
}

# Codes that the Pallas products widen. Of act_order, whose groups are anywhere, they know nothing.
INT4 = tuple(f"int4.{kind}.g{group}" for kind in ("awq", "gptq", "pack") for group in (32, 64, 128, -1))
QUANTISED = (
    *("fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym", *INT4),
    *(f"w4a8_fp8.g{group}" for group in (32, 64, 128, -1)),
    *("mxfp4.g32", "nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
)
MATMULS = ("gemm.linear", "gemm.grouped", "moe.fused")


def dense_limits(ctx: SelectionContext) -> str | None:
    if ctx.site.dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {ctx.site.dtype}"
    return None if ctx.site.fmt == "dense" else f"takes dense weights, not {ctx.site.fmt}"


def quantised_limits(ctx: SelectionContext) -> str | None:
    if ctx.site.dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, not {ctx.site.dtype}"
    return None if ctx.site.fmt in QUANTISED else f"takes weights in {', '.join(QUANTISED)}, not {ctx.site.fmt}"


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    return Kernel(op, fn=f"sglang_tpu.{fn}", device=("tpu",), features=GRAPHS, **facts)


TILES: dict[str, Any] = {
    "supports": quantised_limits,
    "pack": "sglang_tpu.weights:pack",
    "unpack": "sglang_tpu.weights:unpack",
    "packed_layout": "tpu.tiles/1",
    "priority": 51,  # no site has both; a tie would be an error
}

KERNELS = [
    *(_kernel(op, f"traced:{name}") for op, name in TRACED.items()),
    _kernel("gemm.linear", "gemm:linear_dense", supports=dense_limits),
    _kernel("gemm.linear", "gemm:linear", **TILES),
    _kernel("gemm.grouped", "gemm:grouped", supports=dense_limits),
    _kernel("gemm.grouped", "gemm:grouped", **TILES),
    _kernel("moe.fused", "moe:fused", supports=dense_limits),
    _kernel("moe.fused", "moe:fused", **TILES),
]


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


KERNELS += [_kernel(op, fn, supports=attention_limits, kv_layouts=(LANE_LAYOUT,)) for op, fn in ATTENTION.items()]


def claims(profiles: tuple[str, ...], *, attention: tuple[str, ...]) -> Claims:
    """`attention`: the dtypes of it. Of the other ops only float16 is refused, which their bodies were never checked with."""
    native = [Claim(op=op, dtypes=DTYPES) for op in TRACED]
    native += [Claim(op=op, dtypes=attention) for op in ATTENTION]
    native += [Claim(op=op, dtypes=DTYPES, formats=("dense", *QUANTISED)) for op in MATMULS]
    return Claims((*native, Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)), profiles=profiles)
