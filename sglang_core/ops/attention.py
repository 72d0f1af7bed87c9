"""Attention over the KV pool (`attn.paged`) and over packed K and V (`attn.ragged`), and what belongs to it.

Both reference bodies feed chunks of keys to `_attend`, one online softmax in float32. Scores never exist for more than one
block of query tiles times KEYS_PER_CHUNK keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import heads_first
from sglang_core.backend.pool import Pool
from sglang_core.ops.attention_plan import (
    KEYS_PER_CHUNK,
    TILE_LENGTHS,
    AttnBatch,
    AttnSpec,
    Plan,
    RaggedBatch,
    Tiles,
    attn_plan,
    pages_per_chunk,
    tiles_per_block,
)
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide, wide_dtype
from sglang_core.ops.tree_mask import on_path

__all__ = [
    "AttnBatch",
    "AttnSpec",
    "Plan",
    "RaggedBatch",
    "attn_merge",
    "attn_paged",
    "attn_plan",
    "attn_ragged",
    "kv_write",
]

NEG_INF = float("-inf")
Chunk = tuple[Tensor, Tensor, Tensor]  # k: [B, Hk, S, D], v: [B, Hk, S, Dv], wide; key positions: int32[B, S]


@op("kv.write")
def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]. Rounds to the pool's dtype. Slots repeat only in page 0."""
    pool.scatter(layer, slot_mapping, k, v)


@op("attn.paged")
def attn_paged(
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
    """Write k, v at plan.slot_mapping, then attend over the pool: extend, decode, mixed and trees of drafts alike.

    q: [T, Hq, D], k: [T, Hk, D], v: [T, Hk, Dv], sinks: [Hq] -> o: [T, Hq, Dv] (, lse: float32[T, Hq], natural log).
    k = v = None: all keys are in the pool already, as always in cross attention. Keys and values are read back as the pool
    rounded them. float32 inside, one rounding to q.dtype at the end. A query that sees no key gives zeros and an lse of -inf.
    With sinks, lse counts them.

    A query at place p of its req sees the keys at places [0, p]; with a window those in (p - window, p]; where it is not causal,
    all of the req, this step's too. Under a tree mask it sees the whole prefix and its own path, and windows count by depth.
    """
    assert k is None or not spec.cross, "cross attention writes nothing: an encoder's step wrote the keys with kv.write"
    if k is not None and v is not None:
        kv_write(k, v, pool, layer, plan.slot_mapping)
    dtype = wide_dtype(q.dtype)
    o, s = attend_tiles(
        q,
        lambda slots: pool.gather_heads(layer, slots, dtype),
        spec,
        plan,
        sinks,
    )
    return (o, s) if lse else o


@op("attn.ragged")
def attn_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with no cache, of each req's queries to its own keys.

    q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]).
    Causal: the last query sees the last key. Rows past cu_q[-1] give zeros; otherwise as `attn.paged`. Neither sinks nor
    tree masks are taken.
    """
    cu_q, cu_k, max_q, max_k = batch.cu_q, batch.cu_k, batch.max_q, batch.max_k
    num_reqs, length = cu_q.shape[0] - 1, max(1, min(max_q, TILE_LENGTHS[-1]))
    len_q, len_k = (cu_q[1:] - cu_q[:-1])[:, None], (cu_k[1:] - cu_k[:-1])[:, None]
    outs = [q.new_zeros(1, spec.num_heads, spec.v_head_dim)]  # row 0: tokens of no req
    lses = [torch.full((1, spec.num_heads), NEG_INF, dtype=wide_dtype(q.dtype), device=q.device)]
    for start in range(0, max_q, length):
        offset = torch.arange(start, start + length, dtype=torch.int32, device=q.device)[None]
        token = torch.where(offset < len_q, cu_q[:-1, None] + offset, 0)
        first_key, last_key = _ragged_ranges(offset, len_q, len_k, spec)
        for r in range(0, num_reqs, tiles_per_block(spec, length)):
            rows = slice(r, r + tiles_per_block(spec, length))
            chunks = _ragged_chunks(k, v, cu_k[:-1][rows], len_k[rows], max_k, wide_dtype(q.dtype))
            o, s = _attend(q[token[rows]], first_key[rows], last_key[rows], chunks, spec, None)
            outs.append(o.flatten(0, 1).to(q.dtype))
            lses.append(s.flatten(0, 1))
    token = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    req = torch.searchsorted(cu_q[1:], token, right=True, out_int32=True)
    offset = token - cu_q[req]
    row = 1 + (offset // length * num_reqs + req) * length + offset % length
    row = torch.where(req < num_reqs, row, 0)
    return (torch.cat(outs)[row], torch.cat(lses)[row]) if lse else torch.cat(outs)[row]


@op("attn.merge")
def attn_merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys. o: [T, Hq, Dv], lse: float32[T, Hq], natural log -> the same.

    An empty side has lse -inf and its o is not looked at; where both are empty the result is zeros and -inf.
    """
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == NEG_INF, 0.0, top)
    w_a, w_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = w_a + w_b
    a = torch.where(w_a[..., None] > 0, wide(o_a), 0) * w_a[..., None]
    b = torch.where(w_b[..., None] > 0, wide(o_b), 0) * w_b[..., None]
    o = (a + b) / torch.where(total > 0, total, 1.0)[..., None]
    return o.to(o_a.dtype), torch.log(total) + top


def attend_tiles(
    q: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    spec: AttnSpec,
    plan: Plan,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a plan's tiles over slots of a pool. q: [T, Hq, D] -> o: [T, Hq, Dv] in q.dtype, lse: [T, Hq], wide.

    read: slots int32[B, S] -> k: [B, Hk, S, D], v: [B, Hk, S, Dv], wide.
    """
    outs, lses = [], []
    for tiles, num_chunks in zip(plan.tiles, plan.static.num_chunks, strict=True):
        size = tiles_per_block(spec, tiles.token.shape[1])
        for i, n in enumerate(num_chunks):
            tile = _slice(tiles, i * size, (i + 1) * size)
            chunks = ((*read(slots), position) for slots, position in _paged_chunks(plan, tile, n))
            tree = None if tile.tree is None else (tile.tree, plan.prefix_lens[tile.row])
            o, s = _attend(q[tile.token], tile.first_key, tile.last_key, chunks, spec, sinks, tree)
            outs.append(o.flatten(0, 1).to(q.dtype))
            lses.append(s.flatten(0, 1))
    # Tokens of no tile (padding) read the row after the last.
    outs.append(q.new_zeros(1, spec.num_heads, spec.v_head_dim))
    lses.append(torch.full((1, spec.num_heads), NEG_INF, dtype=wide_dtype(q.dtype), device=q.device))
    return torch.cat(outs)[plan.tile_row], torch.cat(lses)[plan.tile_row]


def _attend(
    q: Tensor,
    first_key: Tensor,
    last_key: Tensor,
    chunks: Iterable[Chunk],
    spec: AttnSpec,
    sinks: Tensor | None,
    tree: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Online softmax. q: [B, L, Hq, D], first_key, last_key: int32[B, L] -> o: [B, L, Hq, Dv], lse: [B, L, Hq], both wide.

    tree: the paths int32[B, L, W], and the prefix_lens int32[B] from which on they count.
    """
    b, length, hq, d = q.shape
    hk, group = spec.num_kv_heads, hq // spec.num_kv_heads
    # The queries that share a KV head form one matrix: no key is repeated.
    q = (wide(q) * spec.scale).view(b, length, hk, group, d).transpose(1, 2).reshape(b, hk, length * group, d)
    top = q.new_full((b, hk, length, group, 1), NEG_INF)
    total, acc = torch.zeros_like(top), q.new_zeros(b, hk, length, group, spec.v_head_dim)
    if sinks is not None:  # like a key that was seen already and has no value
        top = sinks.to(q.dtype).view(hk, 1, group, 1).expand_as(top)
        total = torch.ones_like(top)
    for k, v, position in chunks:
        scores = torch.matmul(q, k.transpose(2, 3))
        if spec.soft_cap is not None:
            scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
        seen = (position[:, None] >= first_key[..., None]) & (position[:, None] < last_key[..., None])
        if tree is not None:
            seen = seen & on_path(tree[0], position - tree[1][:, None])
        bias = torch.where(seen, 0.0, q.new_full((), NEG_INF))  # added: much faster than `where` on all heads
        scores = scores.view(b, hk, length, group, -1) + bias[:, None, :, None]
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = torch.where(new_top == NEG_INF, 0.0, new_top)
        weights, decay = (scores - finite).exp_(), torch.exp(top - finite)
        total = total * decay + weights.sum(-1, keepdim=True)
        acc = acc * decay + torch.matmul(weights.flatten(2, 3), v).view(acc.shape)
        top = new_top
    some = (last_key > first_key)[:, :, None]
    o = (acc / total).transpose(1, 2).flatten(2, 3)
    lse = (top + torch.log(total)).transpose(1, 2).flatten(2)
    return torch.where(some[..., None], o, 0), torch.where(some, lse, NEG_INF)


def _slice(tiles: Tiles[Tensor], start: int, stop: int) -> Tiles[Tensor]:
    return tiles.map(lambda x: x[start:stop])


def _paged_chunks(plan: Plan, tiles: Tiles[Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """-> slots, key positions: int32[B, S] each."""
    page_size, num_pages = plan.static.page_size, plan.static.num_pages
    step = min(pages_per_chunk(page_size), num_pages) * page_size
    row, start = tiles.row[:, None], tiles.first_page[:, None] * page_size
    first, last = tiles.first_key.amin(1, keepdim=True), tiles.last_key.amax(1, keepdim=True) - 1
    for chunk in range(count):
        keys = torch.arange(chunk * step, (chunk + 1) * step, dtype=torch.int32, device=row.device)
        position = start + keys
        live = torch.minimum(torch.maximum(position, first), last).clamp(min=0)  # a stale slot may hold NaN: not read
        slot = plan.page_table[row, live // page_size] * page_size + live % page_size
        yield slot, position


def _ragged_ranges(offset: Tensor, len_q: Tensor, len_k: Tensor, spec: AttnSpec) -> tuple[Tensor, Tensor]:
    """offset: int32[1, L], len_q, len_k: int32[R, 1] -> the keys each query sees, [first, last): int32[R, L]."""
    position = offset + len_k - len_q
    last = torch.minimum(position + 1, len_k) if spec.causal else len_k.expand_as(position)
    first = (position - (spec.window - 1)).clamp(min=0) if spec.window is not None else torch.zeros_like(position)
    return first, torch.where(offset < len_q, last, 0)


def _ragged_chunks(
    k: Tensor, v: Tensor, start: Tensor, length: Tensor, max_k: int, dtype: torch.dtype
) -> Iterator[Chunk]:
    for first in range(0, max_k, KEYS_PER_CHUNK):
        keys = torch.arange(first, min(first + KEYS_PER_CHUNK, max_k), dtype=torch.int32, device=k.device)
        row = (start[:, None] + torch.minimum(keys, length - 1)).clamp(0, k.shape[0] - 1)
        yield heads_first(k, row).to(dtype), heads_first(v, row).to(dtype), keys.expand_as(row)
