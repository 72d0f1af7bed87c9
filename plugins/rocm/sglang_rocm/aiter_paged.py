"""attn.paged by AITER, and the plan for it. Importing this imports it.

Reqs that extend by many tokens attend over keys that are copied out of the pool first, packed, which costs little beside so many queries, and reads no slot
that nobody wrote. Reqs that extend by few, such as those that decode in the same step, are Triton's; so are steps that are graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from sglang_triton import attention, attention_plan
from sglang_triton.attention_plan import WorkPlan, one_copy
from sglang_triton.kv_write import kv_write
from sglang_triton.rope_paged import rope_paged as triton_rope_paged
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnBatch, AttnSpec, Plan, PlanStatic, RaggedBatch
from sglang_rocm.aiter_attention import ragged, reaches_too_far

# New tokens from which a req's keys are worth a copy. An estimate: at 4 TB/s and 500 TFLOP/s, with four queries to a key, the copy then takes a quarter of the products' time.
MANY = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class GatheredPlan(Plan):
    """The batch on the device; which of its rows AITER takes, over which slots, and Triton's plan for the others."""

    rows: Tensor  # int32[T']: of q
    reqs: RaggedBatch  # of these rows, and of these keys
    slots: Tensor  # int32[Tk]: of their keys, req by req
    whole: bool  # these are all rows there are
    fresh: bool  # and no key is older than the step
    others: WorkPlan | None
    other_rows: Tensor  # int32[T - T']


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`. A bucket's, which a graph will read, is Triton's, and so is that of a step with no long extend."""
    many = batch.cu_extend_cpu.diff() >= MANY
    num_keys = int(batch.seq_lens_cpu[many].sum())
    if batch.static or not many.any() or reaches_too_far(num_keys, spec):
        return attention_plan.plan(spec, batch, device, out)
    assert out is None, "a plan into the buffers of another is a bucket's"
    mine, rows = part(batch, many)
    rest, other_rows = part(batch, ~many)
    lens = mine.seq_lens_cpu
    cu_k = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    host = [getattr(batch, f"{name}_cpu") for name in ("cu_extend", "prefix_lens", "seq_lens", "page_table", "slot_mapping")]  # fmt: skip
    host += [rows, mine.cu_extend_cpu, cu_k, slots_of(mine), other_rows]
    cu_extend, prefix_lens, seq_lens, page_table, slot_mapping, *placed = one_copy(
        [x.contiguous() for x in host], device
    )
    return GatheredPlan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=mine.max_extend,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            num_chunks=(),
        ),
        cu_extend=cu_extend,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        page_table=page_table,
        slot_mapping=slot_mapping,
        tiles=(),
        tile_row=slot_mapping[:0],
        rows=placed[0],
        reqs=RaggedBatch(
            cu_q=placed[1],
            cu_k=placed[2],
            cu_q_cpu=mine.cu_extend_cpu,
            cu_k_cpu=cu_k,
            max_q=mine.max_extend,
            max_k=int(lens.max()),
        ),
        slots=placed[3],
        whole=len(rows) == batch.num_tokens,
        fresh=not bool(mine.prefix_lens_cpu.any()),
        others=attention_plan.plan(spec, rest, device) if len(other_rows) else None,
        other_rows=placed[4],
    )


def part(batch: AttnBatch, chosen: Tensor) -> tuple[AttnBatch, Tensor]:
    """chosen: bool[R] -> a batch of these reqs alone, and the rows of their tokens: int32."""
    lens = batch.cu_extend_cpu.diff()
    rows = chosen.repeat_interleave(lens).nonzero().flatten().int()
    taken = lens[chosen]
    made = AttnBatch(
        cu_extend_cpu=torch.cat([taken.new_zeros(1), taken.cumsum(0)]).int(),
        prefix_lens_cpu=batch.prefix_lens_cpu[chosen],
        seq_lens_cpu=batch.seq_lens_cpu[chosen],
        page_table_cpu=batch.page_table_cpu[chosen],
        slot_mapping_cpu=batch.slot_mapping_cpu[rows],
        num_tokens=len(rows),
        num_reqs=len(taken),
        max_extend=int(taken.max()) if len(taken) else 0,
        num_pages=batch.num_pages,
        page_size=batch.page_size,
    )
    return made, rows


def slots_of(batch: AttnBatch) -> Tensor:
    """int32[Tk]: of every key, req by req, oldest first."""
    lens = batch.seq_lens_cpu
    req = torch.arange(len(lens)).repeat_interleave(lens)
    position = torch.arange(len(req)) - (lens.cumsum(0) - lens)[req]
    page = batch.page_table_cpu[req, position // batch.page_size]
    return (page * batch.page_size + position % batch.page_size).int()


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
    if not isinstance(plan, GatheredPlan):
        return attention.paged(q, k, v, pool, layer, spec, plan, sinks=sinks, lse=lse)  # type: ignore[arg-type]
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    packed = (k, v) if plan.whole and plan.fresh and k is not None and v is not None else pool.gather(layer, plan.slots)
    if plan.whole:
        return ragged(q, *packed, plan.reqs, spec, lse=lse)
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)  # rows of no req stay so
    sums = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    found = ragged(q[plan.rows], *packed, plan.reqs, spec, lse=True)
    results = [(plan.rows, found)]
    if plan.others is not None:
        found = attention.paged(q[plan.other_rows], None, None, pool, layer, spec, plan.others, lse=True)
        results.append((plan.other_rows, found))
    for rows, (values, own_sums) in results:
        o.index_put_((rows,), values)
        sums.index_put_((rows,), own_sums)
    return (o, sums) if lse else o


rope_paged = partial(triton_rope_paged, paged=paged)
