"""Attention over latents for Hopper: what the kernel of `hopper_latent_kernels` is launched with. Of the provider `hopper`."""

from __future__ import annotations

from functools import partial

import triton
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec
from sglang_triton import attention
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention import Tile
from sglang_triton.attention_aot import LATENT, spec_of, unsplit
from sglang_triton.attention_launch import scale_of
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.gluon_attention import LAYOUT, POINTERS, WARPS, descriptor
from sglang_triton.hopper_attention import FORM
from sglang_triton.hopper_kernels import ROWS
from sglang_triton.hopper_latent_kernels import HALF, KEYS, RANK, ROPE, _attend_latents_hopper
from sglang_triton.rows import as_heads


def mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor | None,
    k_pe: Tensor | None,
    pool: Pool,
    layer: int,
    spec: MLASpec,
    plan: WorkPlan,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first.

    Tiles of 16 rows, of few heads and few tokens, are Triton's.
    """
    wide = partial(attend_items, as_heads(q_pe))
    return attention.mla_paged(q_nope, q_pe, c_kv, k_pe, pool, layer, spec, plan, lse=lse, wide=wide)


def attend_items(q_pe: Tensor, q: Tensor, tile: Tile, spec: AttnSpec, plan: WorkPlan, i: int) -> None:
    """The tier `i` of the plan, of tiles of ROWS rows or of a token with more heads. q: [T, Hq, rank], q_pe: [T, Hq, rope_dim]."""
    tier, static = plan.static.tiers[i], plan.static
    box = min(static.page_size, KEYS.value)
    c_desc, _ = descriptor(tile.store.k.flatten(0, 1), box, HALF.value)
    pe_desc, _ = descriptor(tile.store.v.flatten(0, 1), box, ROPE.value)
    blocks = triton.cdiv(tier.tokens * spec.num_heads, ROWS.value)
    _attend_latents_hopper[(tier.capacity * blocks,)](
        q, q.stride(0), q.stride(1), q_pe, q_pe.stride(0), q_pe.stride(1), c_desc, pe_desc, plan.page_table, static.num_pages,
        tile.o, tile.lse, tile.part_o, tile.part_lse, scale_of(spec), plan.work, i, tier.first,
        NUM_HEADS=spec.num_heads, BLOCKS=blocks, PAGE=static.page_size, CAUSAL=spec.causal,
        SPLIT=tile.part_o is not None, LSE=tile.lse is not None, num_warps=WARPS,
    )  # fmt: skip


def hopper_spec(name: str, spec: AttnSpec, *, page: int) -> AotSpec:
    box = min(page, KEYS.value)
    boxes = {"c_desc": HALF.value, "pe_desc": ROPE.value}
    return AotSpec(
        op="attn.mla_paged",
        name=f"hopper, {name}",
        kernel=_attend_latents_hopper,
        signature={
            **{key: f"tensordesc<bf16[{box},{columns}],{LAYOUT!r}>" for key, columns in boxes.items()},
            **dict.fromkeys(("q_token", "q_head", "q_pe_token", "q_pe_head"), "i32"),
            **POINTERS,
            "q_pe": "*bf16",
            **dict.fromkeys(("part_o", "part_lse"), "*fp32"),
            **dict.fromkeys(("table", "work"), "*i32"),
            **dict.fromkeys(("num_pages", "counter", "items"), "i32"),
        },
        constexprs={
            "NUM_HEADS": spec.num_heads,
            "BLOCKS": triton.cdiv(spec.num_heads, ROWS.value),
            "PAGE": page,
            "CAUSAL": True,
            "SPLIT": True,
            "LSE": True,
        },
        fixed={"num_warps": WARPS},
        odd=("num_pages", "counter", "items"),
        instructions={FORM.arch: FORM.instructions},
        archs=(FORM.arch,),
    )


AOT = (
    hopper_spec("128 heads, page of 64", LATENT, page=64),
    hopper_spec("128 heads, page of 16", LATENT, page=16),
    unsplit(
        hopper_spec("64 heads, page of 64", spec_of(64, 1, RANK.value + ROPE.value, v_head_dim=RANK.value), page=64)
    ),
)
