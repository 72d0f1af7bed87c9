"""attn.paged, attn.plan and kv.write (csrc/attention.inl)."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnBatch, AttnSpec, Plan, PlanStatic
from sglang_xeon.library import ops

_attention, _attention_lse, _kv_write = ops.attention.default, ops.attention_lse.default, ops.kv_write.default


def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]."""
    _kv_write(k, v, pool.k(layer), pool.v(layer), slot_mapping)


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
        pool.k(layer),
        pool.v(layer),
        plan.slot_mapping,
        plan.cu_extend,
        plan.prefix_lens,
        plan.seq_lens,
        plan.page_table,
        sinks,
        spec.scale,
        spec.soft_cap or 0.0,
        spec.window or 0,
        spec.causal,
    )
    if lse:
        return _attention_lse(*args, True)  # type: ignore[no-any-return]
    return _attention(*args)  # type: ignore[no-any-return]


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """The batch as it is: the kernel cuts its own work, so the reference's tiles are left out."""
    made = Plan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            num_chunks=(),
        ),
        cu_extend=batch.cu_extend_cpu,
        prefix_lens=batch.prefix_lens_cpu,
        seq_lens=batch.seq_lens_cpu,
        page_table=batch.page_table_cpu.contiguous(),
        slot_mapping=batch.slot_mapping_cpu,
        tiles=(),
        tile_row=batch.slot_mapping_cpu[:0],
    )
    if out is None:
        return made
    assert out.static == made.static, f"plan of another bucket: {made.static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out
