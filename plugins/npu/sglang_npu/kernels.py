"""Which kernels there are, as facts, and what the vendor documents of each op as predicates. Imports neither torch nor torch_npu.

Limits are those that the documentation of torch_npu 2.13 gives for the Atlas A2 and A3 series. What `tests` break, the emulation refuses too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_core.api import Claim, Claims, Kernel, SelectionContext, Support, Waiver

Supports = Callable[[SelectionContext], str | None]

DEVICES = ("npu",)
HALVES = ("bfloat16", "float16")
FLOATS = (*HALVES, "float32")
GRAPHS = frozenset({"graph_safe"})
ATTENTION_PAGE = "https://www.hiascend.com/document/detail/zh/Pytorch/700/apiref/apilist/ptaoplist_001232.html"
PROFILES = (
    "base",
    "serving",
    "mla",
    "moe",
    "window",
    "sinks",
    "quant:int8.token_channel",
    "quant:int4.awq.g128",
    "graph",
    "e2e",
)

INNER = 65535  # elements in the last dim of a matrix
PAGE_UNIT, LONGEST_PAGE = 16, 512  # tokens
HEAD_UNIT, LONGEST_HEAD = 16, 512  # dims of a head
PACKED_HEAD, PACKED_DTYPE = 128, "bfloat16"  # where several longer queries are a call
PACKED_KEYS = 192  # the wider heads of those, over keys without pages
MOST_HEADS, MOST_SHARING = 256, 64  # query heads, and query heads that share keys
CODES, CODED_UNIT, CODED_LAYOUT = "int8", 32, "npu.int8"
CANONICAL = "canonical"
LAYOUTS = (CANONICAL, CODED_LAYOUT)
LATENT_RANK, LATENT_ROPE = 512, 64
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LATENT_LAYOUT = "npu.latents"
ROPE_DIMS, ROPE_HEADS = 896, 1000  # below
EXPERTS, GROUPED_EXPERTS = 2048, 1024
INT4 = tuple(f"int4.{kind}.g{group}" for kind in ("awq", "gptq", "pack") for group in (32, 64, 128, -1))
EXPERT_FORMATS = ("dense", "int8.token_channel")
GROUP_ALIGNMENT = 32  # experts of a group count as a multiple of so many


def floats(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in FLOATS else f"takes {', '.join(FLOATS)}, not {ctx.site.dtype}"


def halves(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in HALVES else f"takes {', '.join(HALVES)}, not {ctx.site.dtype}"


def rope(ctx: SelectionContext) -> str | None:
    spec, dims = ctx.site.spec, ctx.site.dims
    if spec.rotary_dim >= ROPE_DIMS or spec.rotary_dim % 2:
        return f"rotates an even number of dims below {ROPE_DIMS}, not {spec.rotary_dim}"
    if (heads := max(dims.get("Hq", 1), dims.get("Hk", 1))) >= ROPE_HEADS:
        return f"takes fewer than {ROPE_HEADS} heads, not {heads}"
    return floats(ctx)


def attention(ctx: SelectionContext) -> str | None:
    spec = ctx.site.spec
    unknown = {
        "soft caps (the vendor's op has no such argument)": spec.soft_cap,
        "trees of drafts": spec.tree,
        "cross attention": spec.cross,
        "queries that see later keys": not spec.causal,
    }
    if found := [name for name, there in unknown.items() if there]:
        return f"knows no {', '.join(found)}"
    if spec.kv_dtype not in ("auto", ctx.site.dtype, CODES):
        return f"reads keys in the dtype of queries, {ctx.site.dtype}, or in {CODES}, not in {spec.kv_dtype}"
    if ctx.kv_layout != (layout := CODED_LAYOUT if spec.kv_dtype == CODES else CANONICAL):
        return f"reads keys in {spec.kv_dtype} in the layout {layout}"
    if spec.kv_dtype == CODES and (spec.head_dim % CODED_UNIT or ctx.page_size % CODED_UNIT):
        return (
            f"reads {CODES} in pages of a multiple of {CODED_UNIT} tokens, of heads of a multiple of {CODED_UNIT} dims, not "
            f"{ctx.page_size} and {spec.head_dim}; set --page-size 128"
        )
    if spec.head_dim != spec.v_head_dim or spec.head_dim % HEAD_UNIT or spec.head_dim > LONGEST_HEAD:
        return (
            f"takes heads of {HEAD_UNIT}, {2 * HEAD_UNIT}, ... {LONGEST_HEAD} dims, the same in keys and values, "
            f"not {spec.head_dim} and {spec.v_head_dim}"
        )
    return heads(ctx, spec.head_dim) or halves(ctx) or pages(ctx)


def packed(ctx: SelectionContext) -> str | None:
    """For attention, and for several longer queries in one call."""
    spec = ctx.site.spec
    if spec.kv_dtype == CODES:
        return f"reads no keys in {CODES}"
    if spec.head_dim != PACKED_HEAD or ctx.site.dtype != PACKED_DTYPE:
        return f"takes {PACKED_DTYPE} heads of {PACKED_HEAD} dims, not {ctx.site.dtype} of {spec.head_dim}"
    return attention(ctx)


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedDims:
    """How wide the heads of a call over keys without pages are."""

    packed: bool  # many reqs are a call
    head: int
    value: int


def ragged_dims(head: int, value: int, dtype: str) -> RaggedDims:
    """The least documented dims that hold `head` of queries and keys, and `value`."""
    if dtype == PACKED_DTYPE and max(head, value) <= PACKED_HEAD:
        return RaggedDims(packed=True, head=PACKED_HEAD, value=PACKED_HEAD)
    if dtype == PACKED_DTYPE and max(head, value) <= PACKED_KEYS:
        return RaggedDims(packed=True, head=PACKED_KEYS, value=PACKED_HEAD if value <= PACKED_HEAD else PACKED_KEYS)
    dim = -(-max(head, value) // HEAD_UNIT) * HEAD_UNIT
    return RaggedDims(packed=False, head=dim, value=dim)


def ragged(ctx: SelectionContext) -> str | None:
    spec = ctx.site.spec
    if spec.soft_cap is not None:
        return "knows no soft caps (the vendor's op has no such argument)"
    dims = ragged_dims(spec.head_dim, spec.v_head_dim, ctx.site.dtype)
    if dims.head > LONGEST_HEAD:
        return f"takes heads of up to {LONGEST_HEAD} dims, not {spec.head_dim} and {spec.v_head_dim}"
    return heads(ctx, dims.head) or halves(ctx)


def heads(ctx: SelectionContext, dim: int) -> str | None:
    spec = ctx.site.spec
    sharing = spec.num_heads // spec.num_kv_heads
    if spec.num_heads <= MOST_HEADS and sharing <= MOST_SHARING and spec.num_heads * dim < INNER:
        return None
    return (
        f"takes up to {MOST_HEADS} heads, {MOST_SHARING} of which share keys, and fewer than {INNER} dims in all, "
        f"not {spec.num_heads} of {dim} dims, {sharing} sharing"
    )


def pages(ctx: SelectionContext) -> str | None:
    if ctx.page_size % PAGE_UNIT == 0 and ctx.page_size <= LONGEST_PAGE:
        return None
    return f"takes pages of {PAGE_UNIT}, {2 * PAGE_UNIT}, ... {LONGEST_PAGE} tokens, not {ctx.page_size}; set --page-size 128"


def latents(ctx: SelectionContext) -> str | None:
    spec = ctx.site.spec
    if spec.tree:
        return "knows no trees of drafts"
    if spec.kv_dtype not in ("auto", ctx.site.dtype):
        return f"reads latents in the dtype of queries, {ctx.site.dtype}, not in {spec.kv_dtype}"
    if spec.rank > LATENT_RANK or spec.rope_dim > LATENT_ROPE:
        return f"takes latents of up to {LATENT_RANK} + {LATENT_ROPE} dims, not {spec.rank} + {spec.rope_dim}"
    if spec.num_heads not in LATENT_HEADS:
        return f"takes {', '.join(map(str, LATENT_HEADS))} heads, not {spec.num_heads}"
    if ctx.page_size % PAGE_UNIT:
        return f"takes pages of a multiple of {PAGE_UNIT} tokens, not {ctx.page_size}; set --page-size 128"
    return halves(ctx)


def routing(ctx: SelectionContext) -> str | None:
    spec = ctx.site.spec
    size = spec.num_experts // spec.num_groups
    aligned = -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT * spec.num_groups
    if size <= 2 or spec.num_experts > EXPERTS or aligned > EXPERTS:
        return (
            f"takes groups of more than 2 experts, {EXPERTS} in all where those of a group count as a multiple of "
            f"{GROUP_ALIGNMENT}, not {spec.num_groups} of {size}"
        )
    return floats(ctx)


def experts(ctx: SelectionContext) -> str | None:
    num = ctx.site.dims.get("X", 2)
    if ctx.site.fmt not in EXPERT_FORMATS:
        return f"takes weights in {', '.join(EXPERT_FORMATS)}, not {ctx.site.fmt}"
    if not 2 <= num <= GROUPED_EXPERTS:
        return f"takes 2 to {GROUPED_EXPERTS} experts, not {num}"
    return inner(ctx) or (floats(ctx) if ctx.site.fmt == "dense" else halves(ctx))


def experts_nz(ctx: SelectionContext) -> str | None:
    return experts(ctx) or halves(ctx)


def wide_experts(ctx: SelectionContext) -> str | None:
    """Rows by rows, for what FRACTAL_NZ is not documented of."""
    if ctx.site.fmt != "dense" or ctx.site.dtype != "float32":
        return f"takes dense weights in float32, not {ctx.site.fmt} in {ctx.site.dtype}"
    return experts(ctx)


def int4_experts(ctx: SelectionContext) -> str | None:
    dims = ctx.site.dims
    if ctx.site.fmt not in INT4:
        return f"takes weights in {INT4[0]}, ... {INT4[-1]}, not {ctx.site.fmt}"
    if not 2 <= dims.get("X", 2) <= GROUPED_EXPERTS:
        return f"takes 2 to {GROUPED_EXPERTS} experts, not {dims['X']}"
    group = int(ctx.site.fmt.rpartition(".g")[2])
    cut = {
        name: dims[name] for name in ("in", "M", "F") if group > 0 and dims.get(name, 0) > group and dims[name] % group
    }
    return (f"takes whole groups of {group} columns, not {cut}" if cut else None) or halves(ctx) or inner(ctx)


def inner(ctx: SelectionContext) -> str | None:
    wide = {name: ctx.site.dims[name] for name in ("in", "out", "M", "F") if ctx.site.dims.get(name, 0) > INNER}
    return f"takes matrices of up to {INNER} rows and columns, not {wide}" if wide else None


def dense(ctx: SelectionContext) -> str | None:
    return floats(ctx) if ctx.site.fmt == "dense" else f"takes dense weights, not {ctx.site.fmt}"


def dense_nz(ctx: SelectionContext) -> str | None:
    return dense(ctx) or halves(ctx)


def int8(ctx: SelectionContext) -> str | None:
    if ctx.site.fmt != "int8.token_channel":
        return f"takes weights in int8.token_channel, not {ctx.site.fmt}"
    return halves(ctx) or inner(ctx)


def int4(ctx: SelectionContext) -> str | None:
    if ctx.site.fmt not in INT4:
        return f"takes weights in {INT4[0]}, ... {INT4[-1]}, not {ctx.site.fmt}"
    return halves(ctx) or inner(ctx)


EXPERT_PACKING = {"pack": "sglang_npu.moe:pack", "unpack": "sglang_npu.moe:unpack"}
INT4_PACKING = {"pack": "sglang_npu.int4:pack", "unpack": "sglang_npu.int4:unpack"}


def _kernel(op: str, fn: str, supports: Supports = floats, **facts: Any) -> Kernel:
    return Kernel(op, fn=f"sglang_npu.{fn}", device=DEVICES, supports=supports, features=GRAPHS, **facts)


def _linear(name: str, supports: Supports, **facts: Any) -> Kernel:
    packing = {"pack": f"sglang_npu.linear:pack_{name}", "unpack": f"sglang_npu.linear:unpack_{name}"}
    return _kernel("gemm.linear", f"linear:{name}", supports, **(packing | facts))


KERNELS = [
    _kernel("norm.rms", "norm:rms_norm"),
    _kernel("norm.add_rms", "norm:add_rms_norm"),
    _kernel("rope.apply", "rope:rope_apply", rope),
    _kernel("act.gated", "activation:gated"),
    _kernel("embed.lookup", "eager:embed_lookup"),
    _kernel("sample.sample", "eager:sample"),
    _kernel("attn.plan", "attention_plan:packed_plan", packed, priority=55, note="a step's prefills in one call"),
    _kernel("attn.plan", "attention_plan:plan", attention, kv_layouts=LAYOUTS),
    _kernel("attn.paged", "attention:paged", attention, kv_layouts=LAYOUTS),
    _kernel("kv.write", "kv_write:kv_write", attention, kv_layouts=LAYOUTS),
    _kernel("attn.mla_plan", "attention_plan:latent_plan", latents, kv_layouts=(LATENT_LAYOUT,)),
    _kernel("attn.mla_paged", "attention:mla_paged", latents, kv_layouts=(LATENT_LAYOUT,)),
    _kernel("kv.write_mla", "kv_write:kv_write_mla", latents, kv_layouts=(LATENT_LAYOUT,)),
    Kernel("attn.ragged", fn="sglang_npu.ragged:ragged", device=DEVICES, supports=ragged),
    _kernel("moe.route", "moe_route:route", routing),
    _kernel(
        "moe.route",
        "eager:route",
        priority=40,
        note="PyTorch's operators, for groups that the vendor's op does not take",
    ),
    _kernel("moe.fused", "moe:fused", experts_nz, note="weights in FRACTAL_NZ", **EXPERT_PACKING),
    _kernel("gemm.grouped", "moe:grouped", experts_nz, note="weights in FRACTAL_NZ", **EXPERT_PACKING),
    _kernel("moe.fused", "moe:fused", wide_experts),
    _kernel("gemm.grouped", "moe:grouped", wide_experts),
    _kernel("moe.fused", "moe:fused", int4_experts, **INT4_PACKING),
    _kernel("gemm.grouped", "moe:grouped", int4_experts, **INT4_PACKING),
    _linear("dense", dense_nz, priority=55, note="weights in FRACTAL_NZ"),
    _kernel("gemm.linear", "linear:dense", dense),
    _linear("int8", int8),
    _kernel("gemm.linear", "int4:linear", int4, **INT4_PACKING),
]

CLAIMED = {
    **dict.fromkeys(
        ("norm.rms", "norm.add_rms", "rope.apply", "act.gated", "embed.lookup", "sample.sample", "moe.route"), FLOATS
    ),
    **dict.fromkeys(
        (
            "attn.plan",
            "attn.paged",
            "kv.write",
            "attn.mla_plan",
            "attn.mla_paged",
            "kv.write_mla",
            "attn.ragged",
        ),
        HALVES,
    ),
}
WEIGHTED = {("moe.fused", "dense"): FLOATS, ("gemm.grouped", "dense"): FLOATS, ("gemm.linear", "dense"): FLOATS}
WEIGHTED |= {(op, "int8.token_channel"): HALVES for op in ("moe.fused", "gemm.grouped")}
WEIGHTED |= {("gemm.linear", "int8.token_channel"): HALVES}
WEIGHTED |= {(op, fmt): HALVES for op in ("gemm.linear", "moe.fused", "gemm.grouped") for fmt in INT4}
LARGE_POOLS = [
    *(
        f"{op}[slots past 2^31 elements, auto pool"
        for op in ("attn.paged", "attn.mla_paged", "kv.write", "kv.write_mla")
    ),
    "attn.paged[slots past 2^31 elements, window",
]


def claims() -> Claims:
    """Of the other ops only float16 is refused, which their bodies were never checked with."""
    native = [Claim(op=op, dtypes=dtypes) for op, dtypes in CLAIMED.items()]
    native += [Claim(op=op, formats=(fmt,), dtypes=dtypes) for (op, fmt), dtypes in WEIGHTED.items()]
    no_float16 = Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)
    large = [
        Waiver(
            cases=f"{cases}-*",
            reason="attention is documented for keys of a layer that int32 counts; larger pools are refused when they are made",
            url=ATTENTION_PAGE,
            expires="2027-12-31",
        )
        for cases in LARGE_POOLS
    ]
    return Claims((*native, no_float16), profiles=PROFILES, waivers=tuple(large))
