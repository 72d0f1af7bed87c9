"""Attention over pools, latents and packed rows, and what belongs to it (csrc/attention.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec, Plan, RaggedBatch
from sglang_xeon.attention_plan import XeonPlan
from sglang_xeon.library import ops

_attention, _attention_lse, _kv_write = ops.attention.default, ops.attention_lse.default, ops.kv_write.default
_latent, _ragged, _merge = ops.latent_attention.default, ops.ragged_attention.default, ops.merge.default


def stores(pool: Pool, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer's two leaves, and the scales of their codes if any."""
    if pool.spec.scaling == "none":
        return pool.k(layer), pool.v(layer), None, None
    return pool.k(layer), pool.v(layer), pool.k_scale(layer), pool.v_scale(layer)


def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]. Latents: c_kv: [T, rank], k_pe: [T, rope_dim]."""
    _kv_write(k, v, *stores(pool, layer), slot_mapping)


def _sharing(plan: Plan) -> Tensor | None:
    return plan.sharing if isinstance(plan, XeonPlan) else None  # of another provider, which says nothing of it


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
        _sharing(plan),
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
        _sharing(plan),
        plan.tree_mask,
        spec.scale,
        lse,
    )
    return result if lse else result[0]


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq])."""
    result: tuple[Tensor, Tensor] = _ragged(
        q, k, v, batch.cu_q, batch.cu_k, spec.scale, spec.soft_cap or 0.0, spec.window or 0, spec.causal, lse
    )
    return result if lse else result[0]


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """o: [T, Hq, Dv], lse: float32[T, Hq] of both sides -> the same of all their keys."""
    return _merge(o_a, lse_a, o_b, lse_b)  # type: ignore[no-any-return]
