"""Low-rank adapters (Hu et al., arXiv:2106.09685), several in one batch: y + scale B A x, with the A and B of each token's own adapter.

All adapters of a layer are one stack, padded with zeros to the largest rank, so that shapes do not depend on who is in the batch.
A few rows fetch their own matrices; many are multiplied by all of them at once, and what is not their own is masked out.
A stack holds finite numbers only: what is masked is still multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.ops.gemm import dense, grouped
from sglang_core.ops.moe import ExpertSpec, activate
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide
from sglang_core.ops.weight import PackedWeight


@op("lora.apply")
def lora_apply(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    token_adapter: Tensor,
    scale: Tensor,
    parts: tuple[int, ...] = (),
) -> Tensor:
    """y: [T, out], x: [T, in], a: [A, P * R, in], b: [A, out, R], token_adapter: int32[T], scale: float32[A, P] -> [T, out].

    A layer of P matrices that run as one (query, key and value; gate and up) has an A for each, one below the other, and
    `parts` says how many rows of the output, and of B, belong to each; () means that all belong to one.

    Tokens of -1 get y as it is, bit for bit. For the others both products are float32 or wider, and so is the sum with y,
    which is rounded once, to y.dtype. A token's result depends on its own adapter only, to the bit.
    """
    num_tokens, num_adapters, num_parts, rank = x.shape[0], a.shape[0], scale.shape[1], b.shape[-1]
    if num_tokens <= num_adapters:
        own = token_adapter.clamp(min=0)
        h = (wide(a[own]) @ wide(x)[:, :, None]).view(num_tokens, num_parts, rank)
        h = h * scale[own, :, None].to(h.dtype)
        delta = [(wide(b_part[own]) @ h[:, p, :, None])[..., 0] for p, b_part in enumerate(_parts(b, parts))]
    else:
        h = (wide(x) @ wide(a).flatten(0, 1).mT).view(num_tokens, num_adapters, num_parts, rank)
        h = _mask(h * scale[:, :, None].to(h.dtype), token_adapter)
        delta = [_expand(h[:, :, p], b_part) for p, b_part in enumerate(_parts(b, parts))]
    return _added(y, delta[0] if len(delta) == 1 else torch.cat(delta, dim=-1), token_adapter)


@op("lora.embed")
def lora_embed(
    y: Tensor, ids: Tensor, a: Tensor, b: Tensor, token_adapter: Tensor, scale: Tensor, vocab_start: int = 0
) -> Tensor:
    """y: [T, M], ids: int32[T], a: [A, V, R], b: [A, M, R], token_adapter: int32[T], scale: float32[A, 1] -> [T, M].

    As `lora.apply`, where A is a table: row [id - vocab_start] of an adapter's is what it adds for that id, before B. Ids outside
    the table add nothing, as in `embed.lookup`.
    """
    local = ids - vocab_start
    inside = (local >= 0) & (local < a.shape[1])
    own = token_adapter.clamp(min=0)
    h = wide(a[own, torch.where(inside, local, 0)])
    h = torch.where(inside[:, None], h, 0.0) * scale[own].to(h.dtype)
    if ids.shape[0] <= a.shape[0]:
        return _added(y, (wide(b[own]) @ h[:, :, None])[..., 0], token_adapter)
    spread = _mask(h[:, None, None].expand(-1, a.shape[0], 1, -1), token_adapter)
    return _added(y, _expand(spread[:, :, 0], b), token_adapter)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertAdapters:
    """Adapters of the experts of a layer: of A adapters, each of X experts has its own three pairs, of gate, up and down."""

    a13: Tensor  # [A, X, 2R, M], gate then up
    b13: Tensor  # [A, X, 2F, R]
    a2: Tensor  # [A, X, R, F]
    b2: Tensor  # [A, X, M, R]
    scale: Tensor  # float32[A, X, 3]: gate, up, down


@op("lora.experts", weighted=True)
def lora_experts(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    adapters: ExpertAdapters,
    token_adapter: Tensor | None,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """`moe.fused` with adapters on both products of each expert: x: [T, M], token_adapter: int32[T] -> [T, M].

    What A gives is rounded to x.dtype, what B gives too; the sum with the expert's own product, in float32, is rounded once
    more. All else is as in `moe.fused`. Without `token_adapter` no token has one. The rows of one adapter and expert are
    multiplied together, so memory and work grow with the rows and not with A times X.
    """
    num_experts, k = adapters.a13.shape[1], ids.shape[1]
    local = ids.flatten() if expert_map is None else expert_map[ids.flatten()]
    expert = torch.where(local >= 0, local, num_experts)
    rows = x[:, None].expand(-1, k, -1).flatten(0, 1)
    if act.weight_on_input:
        rows = (wide(rows) * weights.flatten()[:, None]).to(x.dtype)
    pair = None
    if token_adapter is not None:
        adapter = token_adapter[:, None].expand(-1, k).flatten()
        none = adapters.a13.shape[0] * num_experts
        pair = torch.where((adapter >= 0) & (local >= 0), adapter * num_experts + local, none)
    h = _by_group(rows, w13, expert, num_experts, bias13)
    if pair is not None:
        half = adapters.b13.shape[2] // 2
        halves = (adapters.b13[:, :, :half], adapters.b13[:, :, half:])
        h = _pair_added(h, rows, adapters.a13, halves, pair, adapters.scale[..., :2])
    h = activate(h, act)
    y = _by_group(h, w2, expert, num_experts, bias2)
    if pair is not None:
        y = _pair_added(y, h, adapters.a2, (adapters.b2,), pair, adapters.scale[..., 2:])
    y = wide(y).view(x.shape[0], k, w2.out_features)
    return (y if act.weight_on_input else y * weights[..., None]).sum(1).to(x.dtype)


def _parts(b: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """b: [A, out, R] -> its rows by part."""
    return tuple(torch.split(b, list(parts), dim=1)) if parts else (b,)


def _mask(h: Tensor, token_adapter: Tensor) -> Tensor:
    """h: [T, A, P, R] -> the same, with zeros but at each token's own adapter."""
    own = token_adapter[:, None] == torch.arange(h.shape[1], dtype=torch.int32, device=h.device)
    return torch.where(own[:, :, None, None], h, 0.0)


def _expand(h: Tensor, b: Tensor) -> Tensor:
    """h: [T, A, R], b: [A, out, R] -> [T, out], the sum over adapters, of which one at most is not zero."""
    return h.flatten(1) @ wide(b).mT.flatten(0, 1)


def _added(y: Tensor, delta: Tensor, token_adapter: Tensor) -> Tensor:
    return torch.where(token_adapter[:, None] >= 0, (wide(y) + delta).to(y.dtype), y)


def _by_group(rows: Tensor, w: PackedWeight, group: Tensor, num_groups: int, bias: Tensor | None = None) -> Tensor:
    """rows: [S, in], group: int32[S] -> [S, out]: each row times its group's matrix, zeros for group `num_groups`."""
    order = torch.sort(group.long(), stable=True).indices
    ones = torch.ones_like(group, dtype=torch.int32)
    sizes = torch.zeros(num_groups + 1, dtype=torch.int32, device=rows.device).scatter_add(0, group.long(), ones)
    out = grouped(rows[order], w, sizes[:-1], bias)
    return torch.empty_like(out).index_put((order,), out)


def _pair_added(y: Tensor, x: Tensor, a: Tensor, b: tuple[Tensor, ...], pair: Tensor, scale: Tensor) -> Tensor:
    """y: [S, out], x: [S, in], a: [A, X, P * R, in], b: P times [A, X, out / P, R], pair: int32[S], scale: [A, X, P] -> [S, out]."""
    num = a.shape[0] * a.shape[1]
    h = _by_group(x, dense(a.flatten(0, 1)), pair, num).view(x.shape[0], len(b), b[0].shape[-1])
    by_pair = scale.flatten(0, 1)[pair.clamp(max=num - 1)]
    h = (wide(h) * by_pair[..., None]).to(x.dtype)
    delta = [_by_group(h[:, p], dense(b_part.flatten(0, 1)), pair, num) for p, b_part in enumerate(b)]
    added = (wide(y) + wide(torch.cat(delta, dim=-1))).to(y.dtype)
    return torch.where(pair[:, None] < num, added, y)
