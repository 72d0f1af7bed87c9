"""attn.paged by FlashInfer's prefill over a paged cache, and the plan for it. Importing this imports it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from sglang_triton import attention, attention_plan
from sglang_triton.kv_write import kv_write
from sglang_triton.rope_paged import rope_paged as triton_rope_paged
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnBatch, AttnSpec, Plan, PlanStatic

WORKSPACE = 128 << 20  # bytes; what its documentation recommends
# A wrapper keeps its plan until the step that reads it is over. The engine has two steps under way at most, and plans a third.
WRAPPERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashPlan(Plan):
    """The batch on the device, and a wrapper that has planned it."""

    wrapper: Any


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`. A bucket's, which a graph will read, is Triton's."""
    if batch.static:
        return attention_plan.plan(spec, batch, device, out)
    assert out is None, "a plan into the buffers of another is a bucket's"
    wrapper = next(wrappers(spec, device))
    pages = -(-batch.seq_lens_cpu // batch.page_size)
    first_page = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
    column = torch.arange(batch.page_table_cpu.shape[1], dtype=torch.int32)
    wrapper.plan(
        batch.cu_extend_cpu,
        first_page,
        batch.page_table_cpu[column < pages[:, None]].to(device),
        (batch.seq_lens_cpu - (pages - 1).clamp(min=0) * batch.page_size).int(),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        batch.page_size,
        causal=spec.causal,
        sm_scale=spec.scale,
        logits_soft_cap=spec.soft_cap,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    static = PlanStatic(
        num_tokens=batch.num_tokens,
        num_reqs=batch.num_reqs,
        max_extend=batch.max_extend,
        num_pages=batch.num_pages,
        page_size=batch.page_size,
        num_chunks=(),
    )
    slot_mapping = batch.slot_mapping_cpu.to(device)
    return FlashPlan(
        static=static,
        cu_extend=batch.cu_extend_cpu.to(device),
        prefix_lens=batch.prefix_lens_cpu.to(device),
        seq_lens=batch.seq_lens_cpu.to(device),
        page_table=batch.page_table_cpu.to(device),
        slot_mapping=slot_mapping,
        tiles=(),
        tile_row=slot_mapping.new_empty(0),
        wrapper=wrapper,
    )


@cache
def workspace(device: torch.device) -> Tensor:
    """Scratch of a run. Steps follow each other on one stream, so one is enough."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


@cache
def wrappers(spec: AttnSpec, device: torch.device) -> Iterator[Any]:
    """WRAPPERS of them in turn. They are a spec's: a step plans once for each."""
    made = [BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD") for _ in range(WRAPPERS)]
    return itertools.cycle(made)


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
    """q: bfloat16[T, Hq, D] -> o: [T, Hq, D] (, lse: float32[T, Hq], natural log). Writes k and v first."""
    if not isinstance(plan, FlashPlan):
        return attention.paged(q, k, v, pool, layer, spec, plan, sinks=sinks, lse=lse)
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    cache = pool.k(layer), pool.v(layer)
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)  # rows of no req stay so
    if not lse:
        return plan.wrapper.run(q.contiguous(), cache, out=o)  # type: ignore[no-any-return]
    sums = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    # Its own sums are of powers of two, which attn.merge would take for powers of e.
    return plan.wrapper.run(q.contiguous(), cache, out=o, lse=sums, return_lse=True, lse_base="ln")  # type: ignore[no-any-return]


rope_paged = partial(triton_rope_paged, paged=paged)
