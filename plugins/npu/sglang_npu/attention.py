"""attn.paged and attn.mla_paged by npu_fused_infer_attention_score_v2 over paged keys and values."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch_npu
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, MLASpec, Plan
from sglang_npu.attention_plan import NpuPlan, Rows, Span, latent_block
from sglang_npu.graphs import host_lengths
from sglang_npu.kv_write import kv_write, kv_write_mla
from sglang_npu.pools import CODED, RANK, ROPE_DIM, widened

MASK = 2048  # rows of the mask that a band is told with, whatever the lengths
BAND = 4  # sparse_mode: of the keys up to a query's own those that `pre_tokens` and `next_tokens` leave; the last query's own is the last key
EVER = 2**31 - 1  # pre_tokens: all
BY_TOKEN_AND_HEAD = 5  # key_quant_mode: a scale for each, in blocks like the keys'


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
    assert isinstance(plan, NpuPlan)
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    wanted = lse or sinks is not None
    if plan.rows is not None and plan.rows.tokens is None:  # a decode: nothing is gathered, nothing scattered
        return _given(*_attend_rows(q, pool, layer, spec, plan.rows, lse=wanted), sinks, lse)
    o, sums = torch.zeros_like(q, memory_format=torch.contiguous_format), _no_keys(q)
    if plan.rows is not None and plan.rows.tokens is not None:
        rows, row_sums = _attend_rows(q[plan.rows.tokens], pool, layer, spec, plan.rows, lse=wanted)
        o.index_put_((plan.rows.tokens,), rows)
        sums.index_put_((plan.rows.tokens,), row_sums)
    for span in plan.spans:
        at = slice(span.start, span.stop)
        o[at], sums[at] = _attend_span(q[at], pool, layer, spec, span, lse=wanted)
    return _given(o, sums, sinks, lse)


def _attend_rows(q: Tensor, pool: Pool, layer: int, spec: AttnSpec, rows: Rows, *, lse: bool) -> tuple[Tensor, Tensor]:
    """q: [B, Hq, D] -> o: [B, Hq, D], float32[B, Hq], which means nothing without `lse`."""
    o, sums = torch_npu.npu_fused_infer_attention_score_v2(
        q.contiguous()[:, None],
        pool.k(layer).flatten(2),
        pool.v(layer).flatten(2),
        atten_mask=rows.hidden,
        actual_seq_kvlen=host_lengths("actual_seq_kvlen", rows.lens_cpu),
        block_table=rows.table,
        block_size=pool.spec.page_size,
        num_query_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        softmax_scale=spec.scale,
        input_layout="BSND",
        return_softmax_lse=lse,
        **(_scales(pool, layer) if pool.layout == CODED else {}),
    )
    return _of_live(o[:, 0], sums, rows, lse=lse)


def _scales(pool: Pool, layer: int) -> dict[str, Any]:
    """float32[N, Hk, P], contiguous."""
    return {
        "dequant_scale_key": pool.k_scale(layer)[..., 0].transpose(1, 2),
        "dequant_scale_value": pool.v_scale(layer)[..., 0].transpose(1, 2),
        "key_quant_mode": BY_TOKEN_AND_HEAD,
        "value_quant_mode": BY_TOKEN_AND_HEAD,
    }


def _attend_span(q: Tensor, pool: Pool, layer: int, spec: AttnSpec, span: Span, *, lse: bool) -> tuple[Tensor, Tensor]:
    """q: [S, Hq, D] -> as `_attend_rows`. TND is the layout of several queries, and documented for fewer dims and dtypes than BSND."""
    alone = len(span.ends) == 1
    keys, values, paging = _numbers(q.dtype, pool, layer, span) if pool.layout == CODED else _pages(pool, layer, span)
    o, sums = torch_npu.npu_fused_infer_attention_score_v2(
        q.contiguous()[None] if alone else q.contiguous(),
        keys,
        values,
        atten_mask=triangle(q.device),
        sparse_mode=BAND,
        pre_tokens=EVER if spec.window is None else spec.window - 1,
        next_tokens=0,
        actual_seq_qlen=span.ends,
        actual_seq_kvlen=span.num_keys,
        num_query_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        softmax_scale=spec.scale,
        input_layout="BSND" if alone else "TND",
        return_softmax_lse=lse,
        **paging,
    )
    o = o[0] if alone else o
    if not lse:
        return o, _no_keys(q)
    return o, sums[0, :, :, 0].t() if alone else sums[:, :, 0]


def _pages(pool: Pool, layer: int, span: Span) -> tuple[Tensor, Tensor, dict[str, Any]]:
    paging = {"block_table": span.table, "block_size": pool.spec.page_size}
    return pool.k(layer).flatten(2), pool.v(layer).flatten(2), paging


def _numbers(dtype: torch.dtype, pool: Pool, layer: int, span: Span) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """[1, S, Hk, D] each, with no pages: longer queries are documented over none of codes."""
    place = torch.arange(pool.spec.page_size, dtype=torch.int32, device=span.table.device)
    slots = (span.table[0, :, None] * pool.spec.page_size + place).flatten()[: span.num_keys[0]]
    k, v = pool.gather(layer, slots)
    return k[None].to(dtype), v[None].to(dtype), {}


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
    """q_nope: [T, Hq, rank], q_pe: [T, Hq, rope_dim] -> o: [T, Hq, rank] (, lse: float32[T, Hq]). Writes c_kv and k_pe first."""
    assert isinstance(plan, NpuPlan)
    if c_kv is not None and k_pe is not None:
        kv_write_mla(c_kv, k_pe, pool, layer, plan.slot_mapping)
    if plan.rows is None:
        return _given(torch.zeros_like(q_nope), _no_keys(q_nope), None, lse)
    block = latent_block(pool.spec.page_size)
    latents, rotated = pool.k(layer).view(-1, block, RANK), pool.v(layer).view(-1, block, ROPE_DIM)
    o, sums = torch_npu.npu_fused_infer_attention_score_v2(
        widened(q_nope, RANK).contiguous()[:, None],
        latents,
        latents,
        query_rope=widened(q_pe, ROPE_DIM).contiguous()[:, None],
        key_rope=rotated,
        actual_seq_kvlen=host_lengths("actual_seq_kvlen", plan.rows.lens_cpu),
        block_table=plan.rows.table,
        block_size=block,
        num_query_heads=spec.num_heads,
        num_key_value_heads=1,
        softmax_scale=spec.scale,
        input_layout="BSND",
        return_softmax_lse=lse,
    )
    return _given(*_of_live(o[:, 0, :, : spec.rank], sums, plan.rows, lse=lse), None, lse)


def _of_live(o: Tensor, sums: Tensor, rows: Rows, *, lse: bool) -> tuple[Tensor, Tensor]:
    """What padding got, of one stale key, is not looked at. sums: float32[B, Hq, 1, 1], or anything without `lse`."""
    o = torch.where(rows.live, o, 0)
    return o, torch.where(rows.live[:, 0], sums[:, :, 0, 0], -torch.inf) if lse else _no_keys(o)


def _given(o: Tensor, sums: Tensor, sinks: Tensor | None, lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """sinks: [Hq]: a key more for each head, with no value, whose share of the softmax is lost. The op has them in layout TND alone,
    which few dims of heads are documented for, and not the 64 of GPT-OSS."""
    if sinks is not None:
        sinks = sinks.float()
        o = (o.float() * torch.sigmoid(sums - sinks)[..., None]).to(o.dtype)
        sums = torch.where(sums == -torch.inf, sums, torch.logaddexp(sums, sinks))
    return (o, sums) if lse else o


def _no_keys(q: Tensor) -> Tensor:
    return torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)


@cache
def triangle(device: torch.device) -> Tensor:
    """bool[2048, 2048], true where nothing is seen."""
    with torch.inference_mode(False):
        return torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu(1)
