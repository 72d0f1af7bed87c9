"""What of attention is compiled ahead of time: the shapes of models that people serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sglang_core.api.ops import AttnSpec
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention_kernels import _attend_items, _attend_packed, _merge_halves, _merge_splits
from sglang_triton.attention_launch import (
    DOT_TYPES,
    LONG,
    RAGGED_ROWS,
    dims_of,
    dot_dtype,
    mask_of,
    parts_of,
    tile_sizes,
)
from sglang_triton.attention_pool import OCP_FP8
from sglang_triton.tuning import ARCHS

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
}
# Tiles of 64 rows and more are multiplied by a warp group; fewer rows are too few for it.
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "mma.sync", "gfx942": "v_mfma", "gfx950": "v_mfma"}
WIDE = INSTRUCTIONS | {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}
BF16 = torch.bfloat16


def spec_of(heads: int, kv_heads: int, dim: int, **more: Any) -> AttnSpec:
    facts = {"v_head_dim": dim, "scale": 0.1} | more
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **facts)


def paged_specs(
    op: str,
    name: str,
    spec: AttnSpec,
    rows: int,
    *,
    stored: torch.dtype = BF16,
    dtype: torch.dtype = BF16,
    page: int = 64,
    widths: tuple[int, int, int] | None = None,
) -> Iterator[AotSpec]:
    """fp8 comes twice: as its type where the device converts it, as bytes where not."""
    if stored == torch.float8_e4m3fn:
        yield from paged_spec(op, name, spec, rows, stored, dtype, page, widths, OCP_FP8)
        without = tuple(arch for arch in ARCHS if arch not in OCP_FP8)
        yield from paged_spec(op, f"{name} as bytes", spec, rows, torch.uint8, dtype, page, widths, without)
    else:
        yield from paged_spec(op, name, spec, rows, stored, dtype, page, widths, ())


def paged_spec(
    op: str,
    name: str,
    spec: AttnSpec,
    rows: int,
    stored: torch.dtype,
    dtype: torch.dtype,
    page: int,
    widths: tuple[int, int, int] | None,
    archs: tuple[str, ...],
) -> Iterator[AotSpec]:
    shared = widths is not None
    widths = widths or (*parts_of(spec.head_dim), spec.v_head_dim)
    dot = dot_dtype(dtype, stored)
    static, dynamic = stored in (torch.float8_e4m3fn, torch.uint8), stored == torch.int8
    scaled = "*fp32" if static or dynamic else None
    signature = {
        **dict.fromkeys(("q0", "q1", "o"), f"*{NAMES[dtype]}"),
        **dict.fromkeys(("k0", "k1", "v"), f"*{NAMES[stored]}"),
        **dict.fromkeys(("part_o", "part_lse"), "*fp32"),
        **dict.fromkeys(("q0_token", "q0_head", "q1_token", "q1_head"), "i32"),
        **dict.fromkeys(("k_head", "v_head", "scale_row"), "i32"),
        **dict.fromkeys(("num_pages", "tree_words", "counter", "items"), "i32"),
        **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        **dict.fromkeys(("table", "prefix_lens", "work"), "*i32"),
    }
    optional = {
        "lse": None,
        "k_scale": scaled,
        "v_scale": scaled,
        "sinks": "*bf16" if spec.has_sinks else None,
        "tree": "*i32" if spec.tree else None,
        "first_key": "*i32" if spec.tree and spec.window else None,
    }
    signature |= {key: of for key, of in optional.items() if of is not None}
    constexprs: dict[str, Any] = {key: None for key, of in optional.items() if of is None}
    k_row, v_row = ((spec.num_kv_heads * width) for width in (spec.head_dim, spec.v_head_dim))
    constexprs |= dict(
        zip(("k0_row", "k1_row", "v_row"), (512, 64, 512) if shared else (k_row, k_row, v_row), strict=True)
    )
    constexprs |= {
        "TOKENS": max(1, rows // (spec.num_heads // spec.num_kv_heads)),
        "PAGE": page,
        "NUM_HEADS": spec.num_heads,
        "NUM_KV_HEADS": spec.num_kv_heads,
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "DOT": DOT_TYPES[dot],
        "SINKS": spec.has_sinks,
        "TREE": spec.tree,
        "SHARED": shared,
        "STATIC": static,
        "DYNAMIC": dynamic,
        "PHASES": rows >= LONG and not shared,
        "SPLIT": True,
        "LSE": False,
    }
    yield AotSpec(
        op=op,
        name=name,
        kernel=_attend_items,
        signature=signature,
        constexprs=constexprs | dims_of(widths) | mask_of(spec),
        sizes=tile_sizes(rows, widths, dot, stored),
        odd=("num_pages", "tree_words", "counter", "items", "scale_row"),
        instructions={} if dot == torch.float32 else WIDE if rows >= LONG else INSTRUCTIONS,
        archs=archs,
    )


def unsplit(spec: AotSpec) -> AotSpec:
    """As it is launched where a plan has cut no keys: there are no partial results."""
    parts = ("part_o", "part_lse")
    signature = {name: of for name, of in spec.signature.items() if name not in parts}
    more = dict.fromkeys(parts) | {"SPLIT": False}
    return replace(spec, name=f"{spec.name}, no splits", signature=signature, constexprs={**spec.constexprs, **more})


def ragged_spec(name: str, spec: AttnSpec, dtype: torch.dtype = BF16) -> AotSpec:
    widths = (*parts_of(spec.head_dim), spec.v_head_dim)
    dot = dot_dtype(dtype, dtype)
    return AotSpec(
        op="attn.ragged",
        name=name,
        kernel=_attend_packed,
        signature={
            **dict.fromkeys(("q0", "q1", "k0", "k1", "v", "o"), f"*{NAMES[dtype]}"),
            **dict.fromkeys(("q_token", "q_head", "k_head", "v_head", "num_reqs", "num_tiles"), "i32"),
            **dict.fromkeys(("cu_q", "cu_k"), "*i32"),
            "lse": "*fp32",
            **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        },
        constexprs={
            "k_row": spec.num_kv_heads * spec.head_dim,
            "v_row": spec.num_kv_heads * spec.v_head_dim,
            "NUM_HEADS": spec.num_heads,
            "NUM_KV_HEADS": spec.num_kv_heads,
            "GROUP": spec.num_heads // spec.num_kv_heads,
            "DOT": DOT_TYPES[dot],
            "LSE": True,
            **dims_of(widths),
            **mask_of(spec),
        },
        sizes=tile_sizes(RAGGED_ROWS, widths, dot, dtype),
        odd=("num_reqs", "num_tiles"),
        instructions={} if dot == torch.float32 else WIDE,
    )


def merge_splits_spec(width: int) -> AotSpec:
    pointers = dict.fromkeys(("part_o", "part_lse"), "*fp32") | {"o": "*bf16", "work": "*i32"}
    return AotSpec(
        op="attn.merge_splits",
        name=f"D={width}",
        kernel=_merge_splits,
        signature=pointers | {"counter": "i32", "merges": "i32"},
        constexprs={"lse": None, "NUM_HEADS": 32, "WV": width, "BV": width, "LSE": False},
        sizes={"D": width},
        odd=("counter", "merges"),
    )


def merge_spec(width: int) -> AotSpec:
    rows = ("num_rows", "num_heads", "a_token", "a_head", "b_token", "b_head")
    pointers = dict.fromkeys(("o_a", "o_b", "o"), "*bf16") | dict.fromkeys(("lse_a", "lse_b", "lse"), "*fp32")
    return AotSpec(
        op="attn.merge",
        name=f"D={width}",
        kernel=_merge_halves,
        signature=pointers | dict.fromkeys(rows, "i32"),
        constexprs={"W": width, "B": width},
        sizes={"D": width},
        odd=("num_rows", "num_heads"),
    )


LLAMA, LATENT = spec_of(32, 8, 128), AttnSpec(num_heads=128, num_kv_heads=1, head_dim=576, v_head_dim=512, scale=0.1)
SHARE = AttnSpec(num_heads=16, num_kv_heads=1, head_dim=576, v_head_dim=512, scale=0.1)  # of one of eight devices
FP8, INT8, FP32 = torch.float8_e4m3fn, torch.int8, torch.float32
LATENT_WIDTHS = (512, 64, 512)
AOT = (
    *paged_specs("attn.paged", "decode", LLAMA, 16),
    *paged_specs("attn.paged", "decode, page of 16", LLAMA, 16, page=16),
    *paged_specs("attn.paged", "decode, fp8", LLAMA, 16, stored=FP8),
    *paged_specs("attn.paged", "decode, int8", LLAMA, 16, stored=INT8),
    *paged_specs(
        "attn.paged", "decode, D=64, window and sinks", spec_of(64, 8, 64, window=128, has_sinks=True), 16, page=16
    ),
    *paged_specs(
        "attn.paged", "decode, D=256, window and soft cap", spec_of(8, 4, 256, window=1024, soft_cap=50.0), 16, page=16
    ),
    *paged_specs("attn.paged", "decode, D=96", spec_of(32, 32, 96), 16),
    *paged_specs("attn.paged", "decode, float32", LLAMA, 16, stored=FP32, dtype=FP32),
    *paged_specs("attn.paged", "tree", spec_of(32, 8, 128, tree=True), 64),
    *paged_specs("attn.paged", "tree, window", spec_of(32, 8, 128, tree=True, window=1024), 64, page=16),
    *paged_specs("attn.paged", "tree, D=256", spec_of(8, 4, 256, tree=True), 64),
    *paged_specs("attn.paged", "extend", LLAMA, 128),
    *map(unsplit, paged_specs("attn.paged", "extend", LLAMA, 128)),
    *map(unsplit, paged_specs("attn.paged", "decode", LLAMA, 16)),
    *paged_specs("attn.paged", "extend, page of 16", LLAMA, 128, page=16),
    *paged_specs("attn.paged", "extend, fp8", LLAMA, 128, stored=FP8),
    *paged_specs("attn.paged", "extend, int8", LLAMA, 128, stored=INT8),
    *paged_specs(
        "attn.paged", "extend, D=64, window and sinks", spec_of(64, 8, 64, window=128, has_sinks=True), 128, page=16
    ),
    *paged_specs(
        "attn.paged", "extend, D=256, window and soft cap", spec_of(8, 4, 256, window=1024, soft_cap=50.0), 128, page=16
    ),
    *paged_specs("attn.paged", "extend, float32", LLAMA, 128, stored=FP32, dtype=FP32),
    *paged_specs("attn.mla_paged", "128 heads", LATENT, 64, widths=LATENT_WIDTHS),
    *paged_specs("attn.mla_paged", "128 heads, fp8", LATENT, 64, widths=LATENT_WIDTHS, stored=FP8),
    *paged_specs("attn.mla_paged", "16 heads", SHARE, 16, widths=LATENT_WIDTHS),
    *paged_specs("attn.mla_paged", "16 heads, page of 16", SHARE, 16, widths=LATENT_WIDTHS, page=16),
    *paged_specs("attn.mla_paged", "16 heads, fp8", SHARE, 16, widths=LATENT_WIDTHS, stored=FP8),
    *paged_specs("attn.mla_paged", "16 heads, float32", SHARE, 16, widths=LATENT_WIDTHS, stored=FP32, dtype=FP32),
    ragged_spec("causal, D=128", LLAMA),
    ragged_spec("D=64", spec_of(16, 16, 64, causal=False)),
    ragged_spec("D=80", spec_of(16, 16, 80, causal=False)),
    ragged_spec("D=192 to 128, causal", spec_of(16, 16, 192, v_head_dim=128)),
    ragged_spec("D=256, window", spec_of(8, 4, 256, window=1024)),
    ragged_spec("D=128, float32", LLAMA, FP32),
    merge_splits_spec(128),
    merge_splits_spec(512),
    merge_spec(128),
)
