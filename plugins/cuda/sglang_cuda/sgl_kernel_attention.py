"""attn.paged by the FlashAttention-3 in sgl-kernel, and the plan for it. Importing this imports it."""

from __future__ import annotations

from functools import partial

import torch
from sgl_kernel.flash_attn import flash_attn_with_kvcache
from sglang_triton.attention_plan import one_copy
from sglang_triton.kv_write import kv_write
from sglang_triton.rope_paged import rope_paged as triton_rope_paged
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnBatch, AttnSpec, Plan, PlanStatic

HOST = ("cu_extend", "prefix_lens", "seq_lens", "page_table", "slot_mapping")


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`: the batch on the device. How keys are split is found there, by each call."""
    static = PlanStatic(
        num_tokens=batch.num_tokens,
        num_reqs=batch.num_reqs,
        max_extend=batch.max_extend,
        num_pages=batch.num_pages,
        page_size=batch.page_size,
        num_chunks=(),
    )
    placed = one_copy([getattr(batch, f"{name}_cpu").contiguous() for name in HOST], device)
    made = Plan(static=static, tiles=(), tile_row=placed[-1][:0], **dict(zip(HOST, placed, strict=True)))
    if out is None:
        return made
    assert out.static == static, f"plan of another bucket: {static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out


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
    """q: [T, Hq, D] -> o: [T, Hq, D] (, lse: float32[T, Hq], natural log). Writes k and v first."""
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    o, sums, *_ = flash_attn_with_kvcache(
        q,
        pool.k(layer),
        pool.v(layer),
        cache_seqlens=plan.seq_lens,
        page_table=plan.page_table,
        cu_seqlens_q=plan.cu_extend,
        max_seqlen_q=plan.static.max_extend,
        softmax_scale=spec.scale,
        causal=spec.causal,
        softcap=spec.soft_cap or 0.0,
        return_softmax_lse=True,
    )
    # Rows of no req, which it leaves as they were allocated: how many there are is known on the device only.
    real = (torch.arange(q.shape[0], dtype=torch.int32, device=q.device) < plan.cu_extend[-1])[:, None]
    o = torch.where(real[..., None], o, 0.0)
    return (o, torch.where(real, sums.mT, float("-inf"))) if lse else o


rope_paged = partial(triton_rope_paged, paged=paged)
