"""Kernels with one mistake each, and an honest attention kernel written apart from the op's body."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnBatch, AttnSpec, Plan
from sglang_core.ops.gemm import dense
from sglang_core.ops.moe import RouteSpec, _in_top_groups
from sglang_core.ops.rope import RopeSpec
from sglang_core.ops.sampling import SampleParams
from sglang_core.ops.weight import PackedWeight


def body(op: str, *args: Any, **kwargs: Any) -> Any:
    return OPS[op].body(*args, **kwargs)


def body_of_merge(*args: Any) -> Any:
    return body("attn.merge", *args)


# Attention, req by req, over whole rows of scores.


def naive_paged(
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
    subtract_max: bool = True,
    masks_with_zero: bool = False,
    heads_dealt_out: bool = False,
    too_far: int = 0,
    future: int = 0,
    log: float = 1.0,
) -> Any:
    """Keyword arguments past `lse` are the mistakes."""
    if k is not None:
        pool.scatter(layer, plan.slot_mapping, k, v)
    out = q.new_zeros(q.shape[0], spec.num_heads, spec.v_head_dim)
    out_lse = torch.full((q.shape[0], spec.num_heads), -math.inf)
    page_size, group = plan.static.page_size, spec.num_heads // spec.num_kv_heads
    for r in range(plan.static.num_reqs):
        rows = slice(int(plan.cu_extend[r]), int(plan.cu_extend[r + 1]))
        length = int(plan.seq_lens[r])
        if length == 0:
            continue
        reach = min(length + too_far, plan.static.num_pages * page_size)
        at = torch.arange(reach)
        slots = plan.page_table[r][at // page_size] * page_size + at % page_size
        keys, values = (x.float().transpose(0, 1) for x in pool.gather(layer, slots))
        keys = keys.repeat(group, 1, 1) if heads_dealt_out else keys.repeat_interleave(group, 0)
        values = values.repeat(group, 1, 1) if heads_dealt_out else values.repeat_interleave(group, 0)
        scores = q[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        position = torch.arange(int(plan.prefix_lens[r]), length)[:, None] + too_far
        seen = at <= position + future if spec.causal else at < reach
        if spec.window is not None:
            seen = seen & (at > position - spec.window)
        if masks_with_zero:
            scores = scores * seen + (~seen).float().masked_fill(~seen, -1e9)
        else:
            scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
            values = F.pad(values, (0, 0, 0, 1))
        top = scores.amax(-1, keepdim=True) if subtract_max else 0.0
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        out[rows] = (weights @ values / total).transpose(0, 1).to(q.dtype)
        out_lse[rows] = (total.log() + top)[..., 0].T * log
    return (out, out_lse) if lse else out


lse_in_base_2 = partial(naive_paged, log=1 / math.log(2))
softmax_without_max = partial(naive_paged, subtract_max=False)
one_page_too_far = partial(naive_paged, too_far=16)
sees_one_key_of_the_future = partial(naive_paged, future=1)
kv_heads_dealt_out = partial(naive_paged, heads_dealt_out=True)


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


def ragged_aligned_at_the_start(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, spec: AttnSpec, **kw: Any
) -> Any:
    """Causal from the first key, where there are more keys than queries."""
    outs, lses = [], []
    for r in range(len(cu_q) - 1):
        a, b = int(cu_q[r]), int(cu_q[r + 1])
        c, d = int(cu_k[r]), int(cu_k[r + 1])
        d = min(d, c + b - a) if spec.causal else d
        cu = [torch.tensor([0, n], dtype=torch.int32) for n in (b - a, d - c)]
        o, s = body("attn.ragged", q[a:b], k[c:d], v[c:d], *cu, spec, max_q=b - a, max_k=d - c, lse=True)
        outs.append(o)
        lses.append(s)
    return torch.cat(outs), torch.cat(lses)


# The rest of a model.


def accumulates_in_bf16(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    weight = w["weight"]
    y = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)
    for k in range(0, x.shape[-1], 64):
        y += (x[..., k : k + 64].float() @ weight[:, k : k + 64].float().T).bfloat16()
    return (y if bias is None else y + bias).to(x.dtype)


def forgets_bias(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w["weight"])


# Mixture of experts


def _route(logits: Tensor, spec: RouteSpec, bias: Tensor | None, **changes: Any) -> Any:
    return body("moe.route", logits, replace(spec, **changes), bias)


def weights_with_the_bias(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    weights, ids = _route(logits, spec, bias)
    return (weights if bias is None else weights + bias[ids] * spec.scale), ids


def forgets_groups(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, num_groups=1, top_groups=1)


def scores_groups_by_their_best(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, group_score="max")


def forgets_to_renormalize(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, renormalize=False)


def scales_before_renormalizing(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, scale=1.0 if spec.renormalize else spec.scale)


def softmax_before_top_k(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    return _route(logits, spec, bias, scoring="sigmoid" if spec.scoring == "sigmoid" else "softmax")


def masks_groups_with_zero(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    """As if experts of the other groups had the score zero, which beats one below zero."""
    weights, ids = _route(logits, spec, bias)
    if bias is None or spec.num_groups == 1:
        return weights, ids
    choice = logits.float().sigmoid() + bias
    masked = torch.where(_in_top_groups(choice, spec), choice, 0.0)
    return weights, torch.sort(masked, descending=True, stable=True).indices[:, : spec.top_k].int()


def takes_the_highest_id_of_equals(logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> Any:
    weights, ids = _route(logits.flip(-1), spec, None if bias is None else bias.flip(-1))
    return weights, spec.num_experts - 1 - ids


def groups_one_row_late(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    later = group_sizes.clone()
    later[0] += 1
    return body("gemm.grouped", x, w, later, bias)  # type: ignore[no-any-return]


def grouped_forgets_bias(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    return body("gemm.grouped", x, w, group_sizes)  # type: ignore[no-any-return]


def gives_rows_of_no_group_to_the_last(
    x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None
) -> Tensor:
    sizes = group_sizes.clone()
    sizes[-1] += x.shape[0] - sizes.sum()
    return body("gemm.grouped", x, w, sizes, bias)  # type: ignore[no-any-return]


def weights_in_half(*args: Any, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    return body("moe.fused", x, w13, w2, weights.bfloat16(), ids, act, **kwargs)  # type: ignore[no-any-return]


def sums_experts_in_the_dtype(*args: Any, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    parts = [
        body("moe.fused", x, w13, w2, weights[:, i : i + 1], ids[:, i : i + 1], act, **kwargs)
        for i in range(ids.shape[1])
    ]
    total = parts[0].bfloat16()
    for part in parts[1:]:
        total = total + part.bfloat16()
    return total.to(x.dtype)


def ignores_the_map(*args: Any, expert_map: Tensor | None = None, **kwargs: Any) -> Tensor:
    x, w13, w2, weights, ids, act = args
    return body("moe.fused", x, w13, w2, weights, ids % w13.num_experts, act, **kwargs)  # type: ignore[no-any-return]


def remote_is_expert_zero(*args: Any, expert_map: Tensor | None = None, **kwargs: Any) -> Tensor:
    clamped = None if expert_map is None else expert_map.clamp(min=0)
    return body("moe.fused", *args, expert_map=clamped, **kwargs)  # type: ignore[no-any-return]


def weight_on_the_other_side(*args: Any, **kwargs: Any) -> Tensor:
    act = replace(args[5], weight_on_input=not args[5].weight_on_input)
    return body("moe.fused", *args[:5], act, **kwargs)  # type: ignore[no-any-return]


def up_then_gate(*args: Any, **kwargs: Any) -> Tensor:
    w13 = args[1]
    flipped = dense(torch.cat(w13["weight"].chunk(2, 1)[::-1], 1))
    if (bias := kwargs.get("bias13")) is not None:
        kwargs["bias13"] = torch.cat(bias.chunk(2, 1)[::-1], 1)
    return body("moe.fused", args[0], flipped, *args[2:], **kwargs)  # type: ignore[no-any-return]


def forgets_the_second_bias(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args, **(kwargs | {"bias2": None}))  # type: ignore[no-any-return]


def forgets_alpha(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args[:5], replace(args[5], alpha=1.702), **kwargs)  # type: ignore[no-any-return]


def forgets_the_limit(*args: Any, **kwargs: Any) -> Tensor:
    return body("moe.fused", *args[:5], replace(args[5], limit=7.0), **kwargs)  # type: ignore[no-any-return]


def rms_without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return body("norm.rms", x, weight, 1e-12)  # type: ignore[no-any-return]


def rms_in_the_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_keeps_the_old_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    return body("norm.add_rms", x, residual, weight, eps)[0], residual


def layer_norm_of_a_sample(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x.float() - x.float().mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.var(-1, keepdim=True) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rotates_the_other_style(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> Any:
    other = replace(spec, style="interleaved" if spec.style == "neox" else "neox")
    return body("rope.apply", q, k, positions, table, other)


def rotates_one_position_late(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> Any:
    return body("rope.apply", q, k, (positions + 1).clamp(max=table.shape[0] - 1), table, spec)


def gates_with_up(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return body("act.gated", torch.cat([up, gate], -1), kind)  # type: ignore[no-any-return]


def gelu_is_tanh(x: Tensor, kind: str) -> Tensor:
    return body("act.gated", x, "gelu_tanh" if kind == "gelu" else kind)  # type: ignore[no-any-return]


def looks_up_what_it_does_not_own(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    return F.embedding((ids - vocab_start).clamp(0, weight.shape[0] - 1), weight)


# Logits and sampling.


def mask_from_the_top_bit(logits: Tensor, bitmask: Tensor) -> Tensor:
    token = torch.arange(logits.shape[1])
    allowed = (bitmask[:, token // 32] >> (31 - token % 32)) & 1
    return torch.where(allowed == 1, logits, -math.inf)


def penalty_always_divides(logits: Tensor, rows: Tensor, ids: Tensor, repetition: Tensor, add: Tensor) -> Tensor:
    return logits.index_put((rows, ids), logits[rows, ids] / repetition + add)


def top_p_off_by_one(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    """Keeps one token more than reaches top_p."""
    scaled = logits / torch.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    p = scaled.sort(-1, descending=True).values
    p = p.masked_fill(torch.arange(p.shape[1]) >= params.top_k[:, None], -math.inf).softmax(-1)
    cumulative = p.cumsum(-1)
    count = (cumulative - p < params.top_p[:, None]).sum(-1, keepdim=True)
    more = cumulative.gather(1, count.clamp(max=p.shape[1] - 1))[:, 0] - 1e-6
    return body(
        "sample.sample", logits, replace(params, top_p=torch.where(params.top_p < 1, more, 1.0)), logprobs=logprobs
    )


def _with(logits: Tensor, params: SampleParams, logprobs: bool, **other: Any) -> Any:
    return body("sample.sample", logits, replace(params, **other), logprobs=logprobs)


def top_k_off_by_one(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, top_k=params.top_k + 1, max_top_k=0)


def forgets_min_p(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, min_p=params.min_p * 0)


def takes_the_first_rows_temperature(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, temperature=params.temperature[:1].expand_as(params.temperature))


def draws_without_the_position(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, positions=params.positions * 0)


def logprobs_after_temperature(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    ids, found = body("sample.sample", logits, params, logprobs=logprobs)
    return ids, None if found is None else (logits / params.temperature[:, None]).log_softmax(-1)


def takes_the_highest_of_equals(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    ids, found = body("sample.sample", logits.flip(-1), params, logprobs=logprobs)
    greedy = logits.shape[1] - 1 - ids
    honest, _ = body("sample.sample", logits, params)
    return torch.where(params.temperature == 0, greedy, honest), found
