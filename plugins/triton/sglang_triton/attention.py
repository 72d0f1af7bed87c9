"""attn.paged, attn.mla_paged, attn.ragged and attn.merge: what the kernels of attention_kernels are launched with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec, RaggedBatch
from sglang_triton.attention_aot import AOT as AOT
from sglang_triton.attention_kernels import _attend_items, _attend_packed, _merge_halves, _merge_splits
from sglang_triton.attention_launch import (
    DOT_TYPES,
    LONG,
    RAGGED_ROWS,
    dims_of,
    dot_dtype,
    mask_of,
    parts_of,
    scale_of,
    tile_sizes,
)
from sglang_triton.attention_plan import LATENT_ROWS, MERGES, ROWS, WorkPlan, merge_programs, num_programs
from sglang_triton.attention_pool import Leaves, has_ocp_fp8
from sglang_triton.kv_write import kv_write
from sglang_triton.rows import as_heads
from sglang_triton.tuning import choose


@dataclass(frozen=True, slots=True)
class Tile:
    """What tiles read beside queries, and where their results go: those of splits are float32."""

    store: Leaves
    o: Tensor
    lse: Tensor | None
    part_o: Tensor | None
    part_lse: Tensor | None


Wide = Callable[[Tensor, Tile, AttnSpec, WorkPlan, int], None]  # queries, tiles, which tier of the plan


def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: WorkPlan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
    wide: Wide | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). Writes k and v first. `wide`: in place of ours for tiles of the most rows."""
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    store = Leaves.of(pool, layer, native_fp8=has_ocp_fp8())
    q = as_heads(q)
    w0, w1 = parts_of(spec.head_dim)
    k0, k1 = store.k, store.k[..., w0:]
    q0, q1 = q, q[..., w0:]
    return _attend(
        q0, q1, k0, k1, store.v, (w0, w1, spec.v_head_dim), store, spec, plan, sinks, lse, shared=False, wide=wide
    )


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
    wide: Wide | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first. `wide`: as `paged`."""
    if c_kv is not None and k_pe is not None:
        kv_write(c_kv[:, None], k_pe[:, None], pool, layer, plan.slot_mapping)
    store = Leaves.of(pool, layer, native_fp8=has_ocp_fp8())
    widths = (spec.rank, spec.rope_dim, spec.rank)
    q0, q1 = as_heads(q_nope), as_heads(q_pe)
    return _attend(
        q0, q1, store.k, store.v, store.k, widths, store, spec.latent, plan, None, lse, shared=True, wide=wide
    )


def _attend(
    q0: Tensor,
    q1: Tensor,
    k0: Tensor,
    k1: Tensor,
    v: Tensor,
    widths: tuple[int, int, int],
    store: Leaves,
    spec: AttnSpec,
    plan: WorkPlan,
    sinks: Tensor | None,
    lse: bool,
    *,
    shared: bool,
    wide: Wide | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    tokens, heads, static = q0.shape[0], spec.num_heads, plan.static
    o = q0.new_empty(tokens, heads, widths[2])
    sums = torch.empty(tokens, heads, dtype=torch.float32, device=q0.device) if lse else None
    part_o = part_sums = None
    if tokens and static.num_merges:
        part_o = torch.empty(static.num_parts, heads, widths[2], dtype=torch.float32, device=q0.device)
        part_sums = torch.empty(static.num_parts, heads, dtype=torch.float32, device=q0.device)
    dot = dot_dtype(q0.dtype, store.k.dtype)
    group = heads // spec.num_kv_heads
    k_row = k0.stride(1)
    for i, tier in enumerate(static.tiers if tokens else ()):
        if not tier.capacity:
            continue
        if wide is not None and tier.rows >= (LATENT_ROWS if shared else ROWS)[-1]:
            wide(q0, Tile(store, o, sums, part_o, part_sums), spec, plan, i)
            continue
        config = choose(
            "attn.mla_paged" if shared else "attn.paged", **tile_sizes(tier.rows, widths, dot, store.k.dtype)
        )
        programs = num_programs(q0.device, tier.rows, latent=shared)
        units = tier.capacity * spec.num_kv_heads * triton.cdiv(tier.tokens * group, config["M"])
        _attend_items[(min(units, programs),)](
            q0, q1, q0.stride(0), q0.stride(1), q1.stride(0), q1.stride(1),
            k0, k1, v, k_row, k1.stride(1), v.stride(1), k0.stride(2), v.stride(2),
            store.k_scale, store.v_scale, spec.num_kv_heads, o, sums, part_o, part_sums,
            scale_of(spec), spec.soft_cap or 0.0, sinks,
            plan.page_table, static.num_pages, plan.tree_mask, static.tree_words, plan.first_key, plan.prefix_lens,
            plan.work, i, tier.first,
            TOKENS=tier.tokens, PAGE=static.page_size, NUM_HEADS=heads, NUM_KV_HEADS=spec.num_kv_heads, GROUP=group,
            **dims_of(widths), DOT=DOT_TYPES[dot], **mask_of(spec), SINKS=sinks is not None, TREE=plan.tree_mask is not None,
            SHARED=shared, STATIC=store.scaling == "static", DYNAMIC=store.scaling == "dynamic",
            PHASES=tier.rows >= LONG and not shared, SPLIT=part_o is not None, LSE=lse, **config,
        )  # fmt: skip
    if tokens and static.num_merges:
        config = choose("attn.merge_splits", D=widths[2])
        programs = merge_programs(q0.device)
        _merge_splits[(min(static.num_merges * heads, programs),)](
            part_o, part_sums, o, sums, plan.work, MERGES, static.first_merge,
            NUM_HEADS=heads, WV=widths[2], BV=triton.next_power_of_2(widths[2]), LSE=lse, **config,
        )  # fmt: skip
    return o if sums is None else (o, sums)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, o: Tensor, sums: Tensor | None, spec: AttnSpec
) -> None:
    """Rows of reqs, to o and sums. q: [T, Hq, D], and there is some req of some token."""
    q, k, v = as_heads(q), as_heads(k), as_heads(v)
    num_reqs, group = batch.cu_q.shape[0] - 1, spec.num_heads // spec.num_kv_heads
    w0, w1 = parts_of(spec.head_dim)
    widths = (w0, w1, spec.v_head_dim)
    dot = dot_dtype(q.dtype, k.dtype)
    config = choose("attn.ragged", **tile_sizes(RAGGED_ROWS, widths, dot, k.dtype))
    length = max(1, config["M"] // group)
    num_tiles = triton.cdiv(batch.max_q, length)
    grid = (num_tiles * num_reqs * spec.num_kv_heads * triton.cdiv(length * group, config["M"]),)
    _attend_packed[grid](
        q, q[..., w0:], q.stride(0), q.stride(1), k, k[..., w0:], v, k.stride(0), v.stride(0), k.stride(1), v.stride(1),
        batch.cu_q, batch.cu_k, o, sums, scale_of(spec), spec.soft_cap or 0.0, num_reqs, num_tiles,
        NUM_HEADS=spec.num_heads, NUM_KV_HEADS=spec.num_kv_heads, GROUP=group,
        **dims_of(widths), DOT=DOT_TYPES[dot], **mask_of(spec), LSE=sums is not None, **config,
    )  # fmt: skip


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
    launch: Callable[..., None] = attend_packed,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]).

    `launch`: in place of ours.
    """
    # Rows of no req: a step that is replayed must find how many there are on the device.
    o = q.new_zeros(q.shape[0], spec.num_heads, spec.v_head_dim)
    sums = torch.full(o.shape[:2], float("-inf"), dtype=torch.float32, device=q.device) if lse else None
    if o.numel() and batch.max_q:
        launch(q, k, v, batch, o, sums, spec)
    return o if sums is None else (o, sums)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """o: [T, Hq, Dv], lse: float32[T, Hq] of both sides -> the same of all their keys."""
    tokens, heads, width = o_a.shape
    o, lse = o_a.new_empty(tokens, heads, width), lse_a.new_empty(tokens, heads)
    if o.numel():
        o_a, o_b = as_heads(o_a), as_heads(o_b)
        config = choose("attn.merge", D=width)
        grid = (triton.cdiv(tokens * heads, config["ROWS"]),)
        _merge_halves[grid](
            o_a, lse_a.contiguous(), o_b, lse_b.contiguous(), o, lse, tokens * heads, heads,
            o_a.stride(0), o_a.stride(1), o_b.stride(0), o_b.stride(1),
            W=width, B=triton.next_power_of_2(width), **config,
        )  # fmt: skip
    return o, lse
