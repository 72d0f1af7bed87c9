"""Which kernels there are, as facts. Imports neither torch nor triton: a kernel's module is imported once it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_core.api import Claim, Claims, Kernel, SelectionContext, Support
from sglang_triton.gluon_limits import (
    ARCHS,
    BLACKWELL,
    HOPPER,
    attention_limits,
    attention_pool_limits,
    latent_limits,
    linear_limits,
)

DEVICES = ("cuda", "rocm", "triton")
# Below the 50 of a backend's own kernels, which know more about their device.
PRIORITY = 40
DTYPES = ("bfloat16", "float16", "float32")
GRAPHS = frozenset({"graph_safe"})
INVARIANT = GRAPHS | {"batch_invariant"}  # a row's result does not depend on its neighbours


def dtype_limits(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in DTYPES else f"takes {', '.join(DTYPES)}, not {ctx.site.dtype}"


# Formats of weights whose codes and activations the kernels of linear layers know. Dense ones are left to the device's BLAS, but where
# `--deterministic` asks for sums in one order.
INT4 = tuple(f"int4.{kind}.g{group}" for kind in ("awq", "gptq", "pack") for group in (32, 64, 128, -1))
QUANTISED = ("fp8.tensor", "fp8.token_channel", "fp8.block128", "int8.token_channel", *INT4, "mxfp4.g32")
EVERY = ("dense", *QUANTISED)
FORMATS = {"gemm.linear": EVERY, "gemm.grouped": EVERY, "moe.fused": EVERY, "lora.experts": EVERY}


def format_limits(ctx: SelectionContext) -> str | None:
    taken = FORMATS[ctx.site.op]
    return dtype_limits(ctx) if ctx.site.fmt in taken else f"takes weights in {', '.join(taken)}, not {ctx.site.fmt}"


def quantised_limits(ctx: SelectionContext) -> str | None:
    return "leaves dense weights to the device's BLAS" if ctx.site.fmt == "dense" else format_limits(ctx)


TUNED = ("gemm.linear", "gemm.grouped", "moe.fused", "attn.paged", "attn.mla_paged")
TUNER = "sglang_triton.tuner:TritonTuner"

# What these kernels do as a whole, whatever device has them: green through the interpreter, but for cases that are too long for it, which
# docs/backends/triton-attention.md names.
PROFILES = (
    *("mla", "moe", "vision", "lora", "ssm"),
    *("window", "soft_cap", "sinks", "tree", "cross", "kv_half", "kv_fp8", "kv_int8", "odd_sizes", "buckets"),
    *(f"quant:{fmt}" for fmt in ("fp8.tensor", "fp8.token_channel", "fp8.block128", "int8.token_channel", "mxfp4.g32")),
    *(f"quant:int4.{fmt}" for fmt in ("awq.g128", "awq.g32", "gptq.g64", "pack.g128", "pack.g-1")),
)

MAX_KEY_DIM = 128  # a few columns of a state of so many rows fit registers, and a chunk of such keys shared memory


def state_limits(ctx: SelectionContext) -> str | None:
    dim = ctx.site.spec.k_head_dim
    return dtype_limits(ctx) if dim <= MAX_KEY_DIM else f"takes keys of at most {MAX_KEY_DIM} dims, not {dim}"


# Providers of their own: no device has run them, so they are taken only where `--kernel attn.paged=hopper` and the like ask for them.
UNPROVEN = 10

# Tokens up to which a step is taken for one that streams weights. An estimate: by the figures of an H200, fp8 products take as long as
# their weights from about 200 rows on, and a library's tiles have 64 or 128.
FEW = 64


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    defaults: dict[str, Any] = {
        "device": DEVICES,
        "supports": dtype_limits,
        "features": INVARIANT,
        "priority": PRIORITY,
    }
    defaults["tune"] = TUNER if op in TUNED else None
    return Kernel(op, fn=f"sglang_triton.{fn}", **(defaults | facts))


def _gluon(provider: str, op: str, fn: str, limits: Callable[..., str | None] | None, **facts: Any) -> Kernel:
    """`limits(ctx, arch)`; None: those of any dtype that Triton's kernels take."""
    invariant = op in ("attn.ragged", "kv.write", "kv.write_mla")
    defaults = {
        "provider": provider,
        "device": ("cuda",),
        "priority": UNPROVEN,
        "features": INVARIANT if invariant else GRAPHS,
        "tune": None,
        "supports": partial(limits, arch=ARCHS[provider]) if limits else dtype_limits,
    }
    return _kernel(op, fn, **(defaults | facts))


def _products(provider: str, many: str) -> tuple[Kernel, ...]:
    """gemm.linear, with few rows by Triton's kernel."""
    variants = (("gemm:linear", (1, FEW)), (many, (FEW + 1, None)))
    features = GRAPHS | {"takes_codes"}
    return tuple(
        _gluon(provider, "gemm.linear", fn, linear_limits, tokens=tokens, features=features) for fn, tokens in variants
    )


KERNELS = (
    _kernel("act.gated", "activation:gated"),
    _kernel("norm.rms", "norm:rms_norm"),
    _kernel("norm.rms_gated", "norm:rms_norm_gated"),
    _kernel("norm.add_rms", "norm:add_rms_norm"),
    _kernel("norm.layer", "norm:layer_norm"),
    _kernel("rope.apply", "rope:rope_apply"),
    _kernel("embed.lookup", "embedding:embed_lookup"),
    _kernel("kv.write", "kv_write:kv_write"),
    _kernel("kv.write_mla", "kv_write:kv_write_mla"),
    _kernel("logits.mask", "logits:mask"),
    _kernel("logits.adjust", "logits:adjust"),
    _kernel("logits.soft_cap", "logits:soft_cap"),
    _kernel("sample.sample", "sampling:sample"),
    _kernel("quant.quantize", "quantize_weight:quantize"),
    _kernel("quant.dequantize", "quantize_weight:dequantize"),
    _kernel("lora.apply", "lora:apply"),
    _kernel("lora.embed", "lora:embed"),
    _kernel("lora.experts", "lora_experts:experts", supports=format_limits, features=GRAPHS),
    _kernel("lora.experts", "lora_experts:experts_invariant", supports=format_limits, priority=PRIORITY - 1),
    _kernel("gemm.linear", "gemm:linear", supports=quantised_limits, features=GRAPHS | {"takes_codes"}),
    _kernel(
        "gemm.linear",
        "gemm:linear_invariant",
        supports=format_limits,
        priority=PRIORITY - 1,
        features=INVARIANT | {"takes_codes"},
    ),
    _kernel("norm.add_rms_quant", "coded:add_rms_norm_quant"),
    _kernel("act.gated_quant", "coded:gated_quant"),
    _kernel("moe.route", "moe_route:route"),
    _kernel("moe.fused", "moe:fused", supports=format_limits, features=GRAPHS),
    _kernel("moe.fused", "moe:fused_invariant", supports=format_limits, priority=PRIORITY - 1),
    _kernel("gemm.grouped", "moe:grouped", supports=format_limits, features=GRAPHS),
    _kernel("gemm.grouped", "moe:grouped_invariant", supports=format_limits, priority=PRIORITY - 1),
    _kernel("ssm.causal_conv1d", "causal_conv:causal_conv1d"),
    _kernel("ssm.gates", "gates:gates"),
    _kernel("ssm.gated_delta_rule", "gated_delta:gated_delta_rule", supports=state_limits),
    _kernel("attn.plan", "attention_plan:plan", features=GRAPHS),
    _kernel("attn.plan", "attention_plan:plan_invariant", priority=PRIORITY - 1),
    _kernel("attn.paged", "attention:paged", features=GRAPHS),
    _kernel("attn.paged", "attention:paged", priority=PRIORITY - 1),
    _kernel("attn.rope_paged", "rope_paged:rope_paged", features=GRAPHS),
    _kernel("attn.rope_paged", "rope_paged:rope_paged", priority=PRIORITY - 1),
    _kernel("attn.mla_plan", "attention_plan:plan", features=GRAPHS),
    _kernel("attn.mla_plan", "attention_plan:plan_invariant", priority=PRIORITY - 1),
    _kernel("attn.mla_paged", "attention:mla_paged", features=GRAPHS),
    _kernel("attn.mla_paged", "attention:mla_paged", priority=PRIORITY - 1),
    _kernel("attn.mla_project", "mla_project:mla_project", features=GRAPHS),
    _kernel("attn.mla_project", "mla_project:mla_project_invariant", priority=PRIORITY - 1),
    _kernel("attn.ragged", "attention:ragged"),
    _gluon(HOPPER, "attn.ragged", "hopper_attention:ragged", attention_limits),
    _gluon(HOPPER, "attn.paged", "hopper_attention:paged", attention_pool_limits),
    _gluon(HOPPER, "attn.plan", "attention_plan:plan", attention_pool_limits),
    _gluon(HOPPER, "kv.write", "kv_write:kv_write", None),
    _gluon(HOPPER, "attn.mla_paged", "hopper_latents:mla_paged", latent_limits),
    _gluon(HOPPER, "attn.mla_plan", "attention_plan:plan", latent_limits),
    _gluon(HOPPER, "kv.write_mla", "kv_write:kv_write_mla", None),
    *_products(HOPPER, "hopper_gemm:linear"),
    _gluon(BLACKWELL, "attn.ragged", "blackwell_attention:ragged", attention_limits),
    _gluon(BLACKWELL, "attn.paged", "blackwell_attention:paged", attention_pool_limits),
    _gluon(BLACKWELL, "attn.plan", "attention_plan:plan_tall", attention_pool_limits),
    _gluon(BLACKWELL, "kv.write", "kv_write:kv_write", None),
    _gluon(BLACKWELL, "attn.mla_paged", "blackwell_latents:mla_paged", latent_limits),
    _gluon(BLACKWELL, "attn.mla_plan", "attention_plan:plan_latents_tall", latent_limits),
    _gluon(BLACKWELL, "kv.write_mla", "kv_write:kv_write_mla", None),
    *_products(BLACKWELL, "blackwell_gemm:linear"),
    _kernel("attn.merge", "attention:merge"),
)


def claims(more: tuple[str, ...]) -> Claims:
    """What a backend with these kernels claims; `more`: profiles of the device itself. Of the other ops only float16 is refused, which their bodies were never checked with."""
    ops = dict.fromkeys(kernel.op for kernel in KERNELS)
    native = [Claim(op=op, dtypes=DTYPES, formats=FORMATS.get(op, ("*",))) for op in ops]
    plan = Claim(op="ssm.plan", support=Support.REFERENCE)  # host integers: whatever the dtype, its body will do
    return Claims(
        (*native, plan, Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)), profiles=(*more, *PROFILES)
    )
