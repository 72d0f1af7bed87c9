"""Batches over a poisoned pool, and attention written the plainest way, in float64, to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops.attention import AttnBatch, AttnSpec
from sglang_core.ops.tree_mask import tree_mask_of

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class PagedCase:
    """One step: its new tokens in q, k, v; the keys and values of whole reqs, as the pool rounds them, in `keys` and `values`."""

    spec: AttnSpec
    batch: AttnBatch
    pool: Pool
    q: Tensor
    k: Tensor
    v: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def paged_case(
    reqs: Sequence[tuple[int, int]],
    *,
    spec: AttnSpec | None = None,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    parents: Sequence[Sequence[int]] | None = None,
    static: bool = False,
    num_tokens: int = 0,
    num_reqs: int = 0,
    max_extend: int = 0,
    num_pages: int = 0,
    seed: int = 0,
) -> PagedCase:
    """reqs: (prefix, extend) each. Pages are permuted, every slot that holds no token is NaN. Sizes above theirs pad.

    scales: static ones of a pool of fp8. parents: the tree that each req's new tokens are.
    """
    g = torch.Generator().manual_seed(seed)
    spec = spec or attn_spec()
    lens = [prefix + extend for prefix, extend in reqs]
    counts = [-(-n // page_size) for n in lens]
    ids = (torch.randperm(sum(counts), generator=g) + 1).to(torch.int32)
    pool_spec = PoolSpec(
        num_layers=1,
        page_size=page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=kv_dtype or dtype,
    )
    pool = Pool(pool_spec, sum(counts) + 1, CPU)
    pool.poison(range(pool.num_pages))
    if scales is not None:
        pool.set_scales(0, *scales)
    rows, columns = max(num_reqs, len(reqs)), max(num_pages, max(counts, default=0))
    table = torch.zeros(rows, columns, dtype=torch.int32)
    slots = []
    for r, pages in enumerate(ids.split(counts)):
        table[r, : len(pages)] = pages
        slots.append((pages[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[: lens[r]])
    keys = [torch.randn(n, spec.num_kv_heads, spec.head_dim, generator=g, dtype=torch.float64).to(dtype) for n in lens]
    values = [
        torch.randn(n, spec.num_kv_heads, spec.v_head_dim, generator=g, dtype=torch.float64).to(dtype) for n in lens
    ]
    for (prefix, _), s, k, v in zip(reqs, slots, keys, values, strict=True):
        pool.scatter(0, s[:prefix], k[:prefix], v[:prefix])

    total = sum(extend for _, extend in reqs)
    tokens = max(num_tokens, total)
    empty = rows - len(reqs)
    extends = torch.tensor([0] + [extend for _, extend in reqs] + [0] * empty)
    batch = AttnBatch(
        cu_extend_cpu=extends.cumsum(0).to(torch.int32),
        prefix_lens_cpu=torch.tensor([prefix for prefix, _ in reqs] + [0] * empty, dtype=torch.int32),
        seq_lens_cpu=torch.tensor(lens + [0] * empty, dtype=torch.int32),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat(
            [s[prefix:] for (prefix, _), s in zip(reqs, slots, strict=True)]
            + [torch.zeros(tokens - total, dtype=torch.int32)]
        ),
        num_tokens=tokens,
        num_reqs=rows,
        max_extend=max(max_extend, int(extends.max())),
        num_pages=columns,
        page_size=page_size,
        static=static,
        tree_mask_cpu=None if parents is None else _mask_rows(parents, tokens, max(max_extend, int(extends.max()))),
    )
    new_k = torch.cat([k[prefix:] for (prefix, _), k in zip(reqs, keys, strict=True)])
    new_v = torch.cat([v[prefix:] for (prefix, _), v in zip(reqs, values, strict=True)])
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, generator=g, dtype=torch.float64).to(dtype)
    k_scale, v_scale = scales or (torch.ones(()), torch.ones(()))
    return PagedCase(
        spec=spec,
        batch=batch,
        pool=pool,
        q=q,
        k=_pad(new_k, tokens),
        v=_pad(new_v, tokens),
        keys=[stored(k, pool_spec.dtype, k_scale) for k in keys],
        values=[stored(v, pool_spec.dtype, v_scale) for v in values],
    )


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x: [S, Hk, D] as a pool of `dtype` gives it back; float64 where it is quantised. scale: [Hk] or [1]."""
    if dtype == torch.float8_e4m3fn:
        codes = (x.float() / scale.reshape(-1, 1)).clamp(-448, 448).to(dtype)
        return codes.double() * scale.double().reshape(-1, 1)
    if dtype == torch.int8:
        largest = x.float().abs().amax(-1, keepdim=True)
        step = largest / 127
        return torch.where(step > 0, (x.float() / step).round(), 0).double() * step
    return x.to(dtype)


def _mask_rows(parents: Sequence[Sequence[int]], tokens: int, max_extend: int) -> Tensor:
    mask = tree_mask_of(parents, max_extend)
    return torch.cat([mask, mask.new_zeros(tokens - mask.shape[0], mask.shape[1])])


def attn_spec(
    num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8, v_head_dim: int | None = None, **more: object
) -> AttnSpec:
    facts = {"scale": head_dim**-0.5, "v_head_dim": v_head_dim or head_dim} | more
    return AttnSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **facts)  # type: ignore[arg-type]


def naive_paged(case: PagedCase, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o: float64[T, Hq, Dv], lse: float64[T, Hq]; padding tokens are zeros and -inf."""
    b, spec = case.batch, case.spec
    o = torch.zeros(b.num_tokens, spec.num_heads, spec.v_head_dim, dtype=torch.float64)
    lse = torch.full((b.num_tokens, spec.num_heads), -math.inf, dtype=torch.float64)
    cu = b.cu_extend_cpu.tolist()
    for r, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        rows = slice(cu[r], cu[r + 1])
        o[rows], lse[rows] = naive_attention(case.q[rows], keys, values, spec, sinks)
    return o, lse


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttnSpec, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One req whose last query sees its last key. q: [Q, Hq, D], k: [S, Hk, D], v: [S, Hk, Dv]."""
    group = spec.num_heads // spec.num_kv_heads
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,shd->hqs", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    query = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    if spec.causal:
        scores = scores.masked_fill(key > query, -math.inf)
    if spec.window is not None:
        scores = scores.masked_fill(key <= query - spec.window, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:1])])
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), math.nan)])
