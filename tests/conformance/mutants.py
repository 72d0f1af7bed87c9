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


def body_of_attn_paged(*args: Any, **kwargs: Any) -> Any:
    return body("attn.paged", *args, **kwargs)


def body_of_ssm_gated_delta_rule(*args: Any) -> Any:
    return body("ssm.gated_delta_rule", *args)


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
    without_tree: bool = False,
    window_by_place: bool = False,
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
        prefix = int(plan.prefix_lens[r])
        position = torch.arange(prefix, length)[:, None] + too_far
        seen, place = (at <= position + future if spec.causal else at < reach), at
        if plan.tree_mask is not None and not without_tree:
            bits = (plan.tree_mask[rows][..., None] >> torch.arange(32)) & 1 == 1
            paths = bits.flatten(1)[:, : length - prefix]
            seen = torch.cat([torch.ones(len(paths), prefix, dtype=torch.bool), paths], 1)[:, :reach]
            if not window_by_place:
                position = prefix + paths.sum(1, keepdim=True) - 1
                place = torch.cat([torch.arange(prefix), position[:, 0]])
        if spec.window is not None:
            seen = seen & (place > position - spec.window)
        if masks_with_zero:
            scores = scores * seen + (~seen).float().masked_fill(~seen, -1e9)
        else:
            scores = scores.masked_fill(~seen, -math.inf)
        # What no query sees may be NaN: its page may be scratch.
        values = torch.where(seen.view(-1, reach).any(0)[:, None], values, 0.0)
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


class _In32Bits:
    """A pool that counts elements in int32, as a kernel does that multiplies a slot by its size before it widens."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self.spec, self.scatter = pool, pool.spec, pool.scatter

    def gather(self, layer: int, slots: Tensor) -> Any:
        row = self.spec.num_kv_heads * self.spec.head_dim
        wrapped = (slots.long() * row + 2**31) % 2**32 - 2**31
        return self._pool.gather(layer, (wrapped // row % (self._pool.num_pages * self.spec.page_size)).int())


def multiplies_slots_in_32_bits(q: Tensor, k: Any, v: Any, pool: Pool, *args: Any, **kw: Any) -> Any:
    return naive_paged(q, k, v, _In32Bits(pool), *args, **kw)  # type: ignore[arg-type]


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


# Recurrent states.


def _delta(args: tuple[Any, ...], **changes: Any) -> Tensor:
    """The body with some of its arguments changed, by name."""
    names = ("q", "k", "v", "g", "beta", "pool", "layer", "spec", "plan")
    return body("ssm.gated_delta_rule", **(dict(zip(names, args, strict=True)) | changes))  # type: ignore[no-any-return]


def delta_without_decay(*args: Any) -> Tensor:
    return _delta(args, g=args[3] * 0)


def delta_decays_after_reading(*args: Any) -> Tensor:
    """Each token's decay comes one token late."""
    return _delta(args, g=torch.cat([args[3][:1] * 0, args[3][:-1]]))


def delta_deals_key_heads_out(*args: Any) -> Tensor:
    """Value head h reads key head h % Hk."""
    heads = torch.arange(args[7].num_v_heads) % args[7].num_k_heads
    return _delta(args, q=args[0][:, heads], k=args[1][:, heads])


def delta_forgets_the_scale(*args: Any) -> Tensor:
    return _delta(args, spec=replace(args[7], scale=1.0))


def delta_keeps_lengths(*args: Any) -> Tensor:
    return _delta(args, spec=replace(args[7], qk_l2norm=False))


def delta_reads_scratch(*args: Any) -> Tensor:
    """Takes what slot 0 holds for a state: written with ones here, so that it fails by its numbers."""
    pool, layer, plan = args[5], args[6], args[8]
    spare = pool.num_slots - 1
    kept = pool.state(layer)[spare].clone()
    pool.state(layer)[spare] = 1.0
    o = _delta(args, plan=replace(plan, read_slots=torch.where(plan.read_slots > 0, plan.read_slots, spare)))
    if not bool((plan.write_slots == spare).any()):
        pool.state(layer)[spare] = kept
    return o


def delta_forgets_states(*args: Any) -> Tensor:
    return _delta(args, plan=replace(args[8], read_slots=args[8].read_slots * 0))


def delta_writes_where_it_read(*args: Any) -> Tensor:
    plan = args[8]
    return _delta(
        args, plan=replace(plan, write_slots=torch.where(plan.read_slots > 0, plan.read_slots, plan.write_slots))
    )


def delta_state_in_half(*args: Any) -> Tensor:
    o = _delta(args)
    state, slots = args[5].state(args[6]), args[8].write_slots
    state[slots] = state[slots].bfloat16().float()
    return o


def delta_overflows(*args: Any) -> Tensor:
    """Divides by products of decays that have become zero: 0 / 0 where much decays."""
    lost = args[3].cumsum(0).exp() == 0
    return torch.where(lost[..., None], torch.nan, _delta(args)).to(args[2].dtype)


def conv_backwards(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return body("ssm.causal_conv1d", x, weight.flip(1), *args, **kwargs)  # type: ignore[no-any-return]


def conv_without_activation(*args: Any, activation: str | None = None) -> Tensor:
    return body("ssm.causal_conv1d", *args)  # type: ignore[no-any-return]


def conv_forgets_bias(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    return body("ssm.causal_conv1d", x, weight, None, *args, **kwargs)  # type: ignore[no-any-return]


def conv_forgets_states(*args: Any, **kwargs: Any) -> Tensor:
    plan = replace(args[5], read_slots=args[5].read_slots * 0)
    return body("ssm.causal_conv1d", *args[:5], plan, **kwargs)  # type: ignore[no-any-return]


def conv_keeps_newest_first(*args: Any, **kwargs: Any) -> Tensor:
    y = body("ssm.causal_conv1d", *args, **kwargs)
    tail, slots = args[3].conv(args[4]), args[5].write_slots
    tail[slots] = tail[slots].flip(1)
    return y  # type: ignore[no-any-return]


def state_plan_without_the_last_req(spec: Any, batch: Any, device: torch.device, out: Any = None) -> Any:
    plan = body("ssm.plan", spec, batch, device, out)
    return replace(plan, cu_extend=torch.cat([plan.cu_extend[:-1], plan.cu_extend[-2:-1]]))


# Adapters.


def adapters_of_their_neighbour(y: Tensor, x: Tensor, a: Tensor, b: Tensor, own: Tensor, *args: Any) -> Tensor:
    other = torch.where(own >= 0, (own + 1) % a.shape[0], own)
    return body("lora.apply", y, x, a, b, other, *args)  # type: ignore[no-any-return]


def adapter_without_scale(*args: Any) -> Tensor:
    return body("lora.apply", *args[:5], torch.ones_like(args[5]), *args[6:])  # type: ignore[no-any-return]


def adapter_of_those_without(y: Tensor, x: Tensor, a: Tensor, b: Tensor, own: Tensor, *args: Any) -> Tensor:
    return body("lora.apply", y, x, a, b, own % a.shape[0], *args)  # type: ignore[no-any-return]


def scale_of_the_first_part(*args: Any) -> Tensor:
    return body("lora.apply", *args[:5], args[5][:, :1].expand_as(args[5]), *args[6:])  # type: ignore[no-any-return]


def embeds_from_the_first_row(*args: Any) -> Tensor:
    """Forgets where this rank's part of the table starts."""
    return body("lora.embed", *args[:6], 0)  # type: ignore[no-any-return]


def expert_adapters_of_gate_only(*args: Any, **kwargs: Any) -> Tensor:
    given = args[6]
    scale = given.scale.clone()
    scale[..., 1] = 0
    return body("lora.experts", *args[:6], replace(given, scale=scale), args[7], **kwargs)  # type: ignore[no-any-return]


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


_WORKSPACE: dict[torch.dtype, Tensor] = {}


def answers_in_its_workspace(x: Tensor, kind: str) -> Tensor:
    """The result lives in memory that the next call writes: right until somebody reads it late."""
    y = body("act.gated", x, kind)
    space = _WORKSPACE.setdefault(x.dtype, torch.empty(1 << 16, dtype=x.dtype))
    return space[: y.numel()].copy_(y.flatten()).view(y.shape)


_CALLS = [0]


def changes_from_call_to_call(x: Tensor, kind: str) -> Tensor:
    """Off by a few ulps of float32 in two of three calls, as where the order of sums depends on who comes first."""
    _CALLS[0] += 1
    y = body("act.gated", x.float(), kind)
    return (y * (1 + 2.0**-21 * (_CALLS[0] % 3))).to(x.dtype)


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
