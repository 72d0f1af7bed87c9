"""Attention over latents by kernels of our own in Gluon: how those of `hopper_latents` and `blackwell_latents` are launched, and compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import triton
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec
from sglang_triton import attention
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention import Tile
from sglang_triton.attention_aot import LATENT, unsplit
from sglang_triton.attention_launch import scale_of
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.gluon_attention import LAYOUT, POINTERS, WARPS, descriptor
from sglang_triton.rows import as_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What sets an architecture's kernel apart."""

    arch: str
    name: str  # of the provider
    rows: int  # of a program
    shares: int = 1  # programs that do the same rows, each for some columns of the results
    keys: int  # of a block
    latents: dict[str, int]  # descriptors of latents, and how many of their columns each copies at once
    rope: int  # columns of rotated keys
    instructions: tuple[str, ...]  # that its assembly must have


def paged(
    kernel: Any,
    form: Form,
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
    """attn.mla_paged by `kernel`. q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first.

    Tiles of 16 rows, of few heads and few tokens, are Triton's.
    """
    wide = partial(attend_items, kernel, form, as_heads(q_pe))
    return attention.mla_paged(q_nope, q_pe, c_kv, k_pe, pool, layer, spec, plan, lse=lse, wide=wide)


def attend_items(
    kernel: Any, form: Form, q_pe: Tensor, q: Tensor, tile: Tile, spec: AttnSpec, plan: WorkPlan, i: int
) -> None:
    """The tier `i` of the plan, of tiles of at most `form.rows` rows or of a token with more heads. q: [T, Hq, rank], q_pe: [T, Hq, rope_dim]."""
    tier, static = plan.static.tiers[i], plan.static
    box = min(static.page_size, form.keys)
    c, pe = (leaf.flatten(0, 1) for leaf in (tile.store.k, tile.store.v))
    descriptors = [descriptor(c, box, columns)[0] for columns in form.latents.values()]
    blocks = triton.cdiv(tier.tokens * spec.num_heads, form.rows)
    kernel[(tier.capacity * blocks * form.shares,)](
        q, q.stride(0), q.stride(1), q_pe, q_pe.stride(0), q_pe.stride(1), *descriptors, descriptor(pe, box, form.rope)[0],
        plan.page_table, static.num_pages, tile.o, tile.lse, tile.part_o, tile.part_lse, scale_of(spec), plan.work, i, tier.first,
        NUM_HEADS=spec.num_heads, BLOCKS=blocks, PAGE=static.page_size, CAUSAL=spec.causal,
        SPLIT=tile.part_o is not None, LSE=tile.lse is not None, num_warps=WARPS,
    )  # fmt: skip


def latent_spec(kernel: Any, form: Form, name: str, spec: AttnSpec, *, page: int) -> AotSpec:
    """Of a tile of one token."""
    box = min(page, form.keys)
    boxes = {**form.latents, "pe_desc": form.rope}
    return AotSpec(
        op="attn.mla_paged",
        name=f"{form.name}, {name}",
        kernel=kernel,
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
            "BLOCKS": triton.cdiv(spec.num_heads, form.rows),
            "PAGE": page,
            "CAUSAL": True,
            "SPLIT": True,
            "LSE": True,
        },
        fixed={"num_warps": WARPS},
        odd=("num_pages", "counter", "items"),
        instructions={form.arch: form.instructions},
        archs=(form.arch,),
    )


def form_specs(kernel: Any, form: Form) -> tuple[AotSpec, ...]:
    """DeepSeek-V3's heads on one device, and on one of two."""
    half = replace(LATENT, num_heads=LATENT.num_heads // 2)
    return (
        latent_spec(kernel, form, "128 heads, page of 64", LATENT, page=64),
        latent_spec(kernel, form, "128 heads, page of 16", LATENT, page=16),
        unsplit(latent_spec(kernel, form, "64 heads, page of 64", half, page=64)),
    )
