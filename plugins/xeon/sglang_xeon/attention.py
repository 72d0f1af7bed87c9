"""Attention over pools, latents and packed rows, and what belongs to it (csrc/attention.inl)."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnBatch, AttnSpec, MLASpec, Plan, PlanStatic
from sglang_xeon.library import ops

_attention, _attention_lse, _kv_write = ops.attention.default, ops.attention_lse.default, ops.kv_write.default
_latent, _ragged, _merge = ops.latent_attention.default, ops.ragged_attention.default, ops.merge.default

COLUMNS = 64  # of a page table, zeros past the pages there are


def stores(pool: Pool, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer's two leaves, and the scales of their codes if any."""
    if pool.spec.scaling == "none":
        return pool.k(layer), pool.v(layer), None, None
    return pool.k(layer), pool.v(layer), pool.k_scale(layer), pool.v_scale(layer)


def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]. Latents: c_kv: [T, rank], k_pe: [T, rope_dim]."""
    _kv_write(k, v, *stores(pool, layer), slot_mapping)


def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: Plan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). Writes k and v first."""
    args = (
        q,
        k,
        v,
        *stores(pool, layer),
        plan.slot_mapping,
        plan.cu_extend,
        plan.prefix_lens,
        plan.seq_lens,
        plan.page_table,
        plan.tree_mask,
        sinks,
        spec.scale,
        spec.soft_cap or 0.0,
        spec.window or 0,
        spec.causal,
    )
    if lse:
        return _attention_lse(*args, True)  # type: ignore[no-any-return]
    return _attention(*args)  # type: ignore[no-any-return]


def mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor | None,
    k_pe: Tensor | None,
    pool: Pool,
    layer: int,
    spec: MLASpec,
    plan: Plan,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv, k_pe first."""
    result: tuple[Tensor, Tensor] = _latent(
        q_nope,
        q_pe,
        c_kv,
        k_pe,
        *stores(pool, layer),
        plan.slot_mapping,
        plan.cu_extend,
        plan.prefix_lens,
        plan.seq_lens,
        plan.page_table,
        plan.tree_mask,
        spec.scale,
        lse,
    )
    return result if lse else result[0]


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: AttnSpec,
    *,
    max_q: int,
    max_k: int,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv], cu_q, cu_k: int32[R + 1] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]).

    max_q and max_k are not needed: the kernel looks at the lengths themselves.
    """
    result: tuple[Tensor, Tensor] = _ragged(
        q, k, v, cu_q, cu_k, spec.scale, spec.soft_cap or 0.0, spec.window or 0, spec.causal, lse
    )
    return result if lse else result[0]


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """o: [T, Hq, Dv], lse: float32[T, Hq] of both sides -> the same of all their keys."""
    return _merge(o_a, lse_a, o_b, lse_b)  # type: ignore[no-any-return]


def plan(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """The batch as it is: the kernel cuts its own work, so the reference's tiles are left out.

    Page tables grow by COLUMNS at a time, so that a step whose reqs have grown by a page still has the shape of the one before.
    """
    num_pages = batch.num_pages if batch.static else -(-batch.num_pages // COLUMNS) * COLUMNS
    page_table = batch.page_table_cpu.contiguous()
    if num_pages > batch.num_pages:
        page_table = torch.nn.functional.pad(page_table, (0, num_pages - batch.num_pages))
    made = Plan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=num_pages,
            page_size=batch.page_size,
            num_chunks=(),
            tree_words=0 if batch.tree_mask_cpu is None else batch.tree_mask_cpu.shape[1],
        ),
        cu_extend=batch.cu_extend_cpu,
        prefix_lens=batch.prefix_lens_cpu,
        seq_lens=batch.seq_lens_cpu,
        page_table=page_table,
        slot_mapping=batch.slot_mapping_cpu,
        tiles=(),
        tile_row=batch.slot_mapping_cpu[:0],
        tree_mask=None if batch.tree_mask_cpu is None else batch.tree_mask_cpu.contiguous(),
    )
    if out is None:
        return made
    assert out.static == made.static, f"plan of another bucket: {made.static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out
