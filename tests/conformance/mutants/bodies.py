"""What mutants are made of: honest kernels, one of them written apart from its op's body; and what the gallery knows of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnSpec, Plan


@dataclass(frozen=True)
class Mutant:
    """`cases`: what must kill it, by a part of their titles; "" is all of its op's fast ones. `features` are what it says of itself.

    `alone`: no other case of the op sees it, so that none of these could be left out.
    """

    op: str
    cases: str = ""
    features: frozenset[str] = frozenset()
    alone: bool = True


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
