"""Attention: the honest kernel of `bodies` with one mistake each."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops.attention import AttnBatch, AttnSpec, Plan, RaggedBatch
from tests.conformance.mutants.bodies import Mutant, body, naive_paged

lse_in_base_2 = partial(naive_paged, log=1 / math.log(2))


softmax_without_max = partial(naive_paged, subtract_max=False)


one_page_too_far = partial(naive_paged, too_far=16)


sees_one_key_of_the_future = partial(naive_paged, future=1)


kv_heads_dealt_out = partial(naive_paged, heads_dealt_out=True)


sees_every_branch = partial(naive_paged, without_tree=True)


window_by_place_in_a_tree = partial(naive_paged, window_by_place=True)


def forgets_scales_of_keys(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any
) -> Any:
    if pool.spec.scaling != "static":
        return naive_paged(q, k, v, pool, layer, spec, plan, **kw)
    if k is not None:
        pool.scatter(layer, plan.slot_mapping, k, v)
    scale = pool.k_scale(layer).repeat_interleave(spec.num_heads // spec.num_kv_heads)
    return naive_paged((q.float() / scale[:, None]).to(q.dtype), None, None, pool, layer, spec, plan, **kw)


def forgets_soft_cap(q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any) -> Any:
    return naive_paged(q, k, v, pool, layer, replace(spec, soft_cap=None), plan, **kw)


def window_off_by_one(q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any) -> Any:
    wider = replace(spec, window=spec.window + 1) if spec.window else spec
    return naive_paged(q, k, v, pool, layer, wider, plan, **kw)


def forgets_sinks(*args: Any, sinks: Tensor | None = None, **kw: Any) -> Any:
    return naive_paged(*args, **kw)


def weights_in_bf16(q: Tensor, *args: Any, **kw: Any) -> Any:
    """Rounds queries to bfloat16 whatever the dtype."""
    return naive_paged(q.bfloat16().to(q.dtype), *args, **kw)


def reads_stale_values(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, *, lse: bool = False, **kw: Any
) -> Any:
    """Weights of zero times whatever the rest of the last page holds."""
    o, s = naive_paged(q, k, v, pool, layer, spec, plan, lse=True, **kw)
    tail = [(int(n) - 1) // 16 * 16 + 15 for n in plan.seq_lens]
    slots = torch.stack([plan.page_table[r][at // 16] * 16 + at % 16 for r, at in enumerate(tail)])
    rest = pool.gather(layer, slots)[1].sum((1, 2)) * 0.0
    reqs = torch.repeat_interleave(plan.cu_extend.diff().long())
    o = o + rest[reqs][:, None, None].to(o.dtype)
    return (o, s) if lse else o


def plans_without_the_last_req(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Any = None) -> Plan:
    """The seq_len of the last req is one short."""
    short = batch.seq_lens_cpu.clone()
    short[-1] -= 1
    return body("attn.plan", spec, replace(batch, seq_lens_cpu=short), device, out)  # type: ignore[no-any-return]


def writes_one_slot_late(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    pool.scatter(layer, (slot_mapping + 1) % (pool.num_pages * pool.spec.page_size), k, v)


def writes_layer_zero(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    pool.scatter(0, slot_mapping, k, v)


def merge_without_guard(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Any:
    top = torch.maximum(lse_a, lse_b)
    w_a, w_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    o = (o_a.float() * w_a[..., None] + o_b.float() * w_b[..., None]) / (w_a + w_b)[..., None]
    return o.to(o_a.dtype), torch.log(w_a + w_b) + top


def merge_in_base_2(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Any:
    o, lse = body("attn.merge", o_a, lse_a * math.log(2), o_b, lse_b * math.log(2))
    return o, lse / math.log(2)


def ragged_aligned_at_the_start(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, spec: AttnSpec, **kw: Any) -> Any:
    """Causal from the first key, where there are more keys than queries."""
    outs, lses = [], []
    for (a, b), (c, d) in zip(*(pairwise(cu.tolist()) for cu in (batch.cu_q_cpu, batch.cu_k_cpu)), strict=True):
        end = min(d, c + b - a) if spec.causal else d
        alone = RaggedBatch.of([b - a], [end - c], q.device)
        o, s = body("attn.ragged", q[a:b], k[c:end], v[c:end], alone, spec, lse=True)
        outs.append(o)
        lses.append(s)
    return torch.cat(outs), torch.cat(lses)


def assumes_adjacent_pages(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any
) -> Any:
    """Takes each req's pages for one run that begins with the first."""
    run = plan.page_table[:, :1] + torch.arange(plan.page_table.shape[1], dtype=torch.int32)
    if k is not None:
        pool.scatter(layer, plan.slot_mapping, k, v)
    table = run.clamp(max=pool.num_pages - 1)
    return naive_paged(q, None, None, pool, layer, spec, replace(plan, page_table=table), **kw)


def sees_pages_of_their_last_owner(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, *, lse: bool = False, **kw: Any
) -> Any:
    """Maps pages back to reqs, which a shared one has several of: the others see zeros there."""
    if k is not None:
        pool.scatter(layer, plan.slot_mapping, k, v)
    owner = {int(page): r for r, row in enumerate(plan.page_table) for page in row}
    lost = [int(row[0]) for r, row in enumerate(plan.page_table) if owner[int(row[0])] != r and int(row[0])]
    o, s = naive_paged(q, None, None, pool, layer, spec, plan, lse=True, **kw)
    for r, row in enumerate(plan.page_table):
        if int(row[0]) in lost and owner[int(row[0])] != r:
            o[int(plan.cu_extend[r]) : int(plan.cu_extend[r + 1])] = 0
    return (o, s) if lse else o


def ignores_a_window_that_just_binds(
    q: Tensor, k: Any, v: Any, pool: Pool, layer: int, spec: AttnSpec, plan: Plan, **kw: Any
) -> Any:
    """Takes a req for short that is one token longer than the window."""
    o = naive_paged(q, k, v, pool, layer, spec, plan, **kw)
    if spec.window is None:
        return o
    whole = naive_paged(q, None, None, pool, layer, replace(spec, window=None), plan, **kw)
    for r, n in enumerate(plan.seq_lens.tolist()):
        rows = slice(int(plan.cu_extend[r]), int(plan.cu_extend[r + 1]))
        if n == spec.window + 1 and rows.stop - rows.start == 1:
            for mine, other in zip(_several(o), _several(whole), strict=True):
                mine[rows] = other[rows]
    return o


def _several(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def merge_without_max(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Any:
    w_a, w_b = lse_a.exp(), lse_b.exp()
    total = w_a + w_b
    a, b = (torch.where(w[..., None] > 0, o.float(), 0.0) * w[..., None] for o, w in ((o_a, w_a), (o_b, w_b)))
    o = torch.where(total[..., None] > 0, (a + b) / total[..., None], 0.0)
    return o.to(o_a.dtype), total.log()


def ragged_without_empty_keys(*args: Any, **kwargs: Any) -> Any:
    """Queries that see no key get the mean of the values."""
    o, lse = body("attn.ragged", *args, **kwargs)
    return torch.where(lse.isinf()[..., None], args[2].float().mean().to(o.dtype), o), lse


def writes_fp8_without_saturation(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    if pool.spec.scaling != "static":
        return pool.scatter(layer, slot_mapping, k, v)
    at = (slot_mapping // pool.spec.page_size, slot_mapping % pool.spec.page_size)
    for leaf, x, scale in zip(
        pool.layer_leaves(layer), (k, v), (pool.k_scale(layer), pool.v_scale(layer)), strict=True
    ):
        code = x.float() / scale[:, None]
        leaf.index_put_(at, torch.where(code.abs() > 448.0, torch.nan, code).to(leaf.dtype))


MUTANTS = {
    "lse_in_base_2": Mutant("attn.paged"),
    "softmax_without_max": Mutant("attn.paged"),
    "one_page_too_far": Mutant("attn.paged"),
    "sees_one_key_of_the_future": Mutant("attn.paged"),
    "kv_heads_dealt_out": Mutant("attn.paged"),
    "sees_every_branch": Mutant("attn.paged", "tree"),
    "window_by_place_in_a_tree": Mutant("attn.paged", "tree"),
    "forgets_scales_of_keys": Mutant("attn.paged", "fp8"),
    "forgets_soft_cap": Mutant("attn.paged", "soft cap"),
    "window_off_by_one": Mutant("attn.paged", "window", alone=False),
    "forgets_sinks": Mutant("attn.paged", "sinks"),
    "weights_in_bf16": Mutant("attn.paged"),
    "reads_stale_values": Mutant("attn.paged"),
    "plans_without_the_last_req": Mutant("attn.plan"),
    "writes_one_slot_late": Mutant("kv.write"),
    "writes_layer_zero": Mutant("kv.write"),
    "merge_without_guard": Mutant("attn.merge"),
    "merge_in_base_2": Mutant("attn.merge"),
    "ragged_aligned_at_the_start": Mutant("attn.ragged"),
    "assumes_adjacent_pages": Mutant("attn.paged"),
    "sees_pages_of_their_last_owner": Mutant("attn.paged", "pages shared"),
    "ignores_a_window_that_just_binds": Mutant("attn.paged", "reqs of its length"),
    "merge_without_max": Mutant("attn.merge", "large sums"),
    "ragged_without_empty_keys": Mutant("attn.ragged"),
    "writes_fp8_without_saturation": Mutant("kv.write", "fp8"),
}
