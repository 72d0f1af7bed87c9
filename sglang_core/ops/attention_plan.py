"""What a step attends over (`AttnSpec`, `AttnBatch`), and the reference plan for it.

The plan cuts each req's new tokens into tiles of queries. A tile knows, per query, the half-open range of key positions it
sees; causality, windows and padding are all in that range. Of its own step's tokens a query may see a path only (`tree_mask`).
Tiles of equal length form a group, longest key range first, so that neighbours do about equal work. All of it happens on the
host, before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.ops.registry import op
from sglang_core.ops.tree_mask import within_window

A = TypeVar("A")
B = TypeVar("B")
Ints = npt.NDArray[np.int32]

TILE_LENGTHS = (1, 16, 128)  # queries a tile may hold: one for decode, few for short extends, many for prefill
KEYS_PER_CHUNK = 256
BLOCK_ELEMENTS = (
    1 << 20
)  # a block of tiles passes over the keys together; its scores, keys and values hold no more each
NO_KEY = 1 << 30  # beyond any text


@dataclass(frozen=True, kw_only=True, slots=True)
class AttnSpec:
    """One kind of attention layer, for this rank. Hashable; the question that kernel selection asks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None  # a query at position p sees keys in (p - window, p]; causal only
    soft_cap: float | None = None  # scores become cap * tanh(score / cap), after scaling
    has_sinks: bool = False  # one more logit a head in the softmax's denominator, with no value
    kv_dtype: str = "auto"  # of the pool, one of KV_DTYPES; auto: that of the activations
    tree: bool = False  # a step may bring a tree mask; causal only
    cross: bool = False  # keys are another text's, as an encoder wrote them; every query sees all; never causal

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} heads over {self.num_kv_heads} KV heads"
        assert self.window is None or (self.causal and self.window >= 1), "a window needs causal attention"
        assert self.causal or not self.tree, "a tree of drafts needs causal attention"
        assert not (self.causal and self.cross), "cross attention knows no order of queries and keys"
        assert self.kv_dtype in ("auto", *KV_DTYPES), f"kv_dtype {self.kv_dtype!r} is none of {', '.join(KV_DTYPES)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttnBatch:
    """What one step attends over: int32 on the host.

    In cross attention the seq_lens, the page table and C are of the keys' text, and prefix_lens and slot_mapping are not looked at.
    Reqs that only fill a bucket have extend 0 (or any) and seq_len 0; tokens that only fill it come last and write to page 0.
    """

    cu_extend_cpu: Tensor  # int32[R + 1]: req r's new tokens are rows [cu[r], cu[r + 1]) of q
    prefix_lens_cpu: Tensor  # int32[R]
    seq_lens_cpu: Tensor  # int32[R]: prefix + extend
    page_table_cpu: Tensor  # int32[R, C]
    slot_mapping_cpu: Tensor  # int32[T]: where each new token's K and V go
    num_tokens: int  # T
    num_reqs: int  # R
    max_extend: int  # Q: no req extends by more
    num_pages: int  # C
    page_size: int
    static: bool = False  # sizes are a bucket's: the plan's shapes may depend on them and on nothing else
    tree_mask_cpu: Tensor | None = None  # int32[T, ceil(Q / 32)], see tree_mask.py; None: every req is a chain


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedBatch:
    """Reqs that attend with no cache: req r's queries are rows [cu_q[r], cu_q[r + 1]) of q, its keys rows [cu_k[r], cu_k[r + 1]) of k.

    On the device for kernels that look at lengths there, on the host for those that are told them.
    """

    cu_q: Tensor  # int32[R + 1]
    cu_k: Tensor  # int32[R + 1]
    cu_q_cpu: Tensor  # the same
    cu_k_cpu: Tensor
    max_q: int  # no req has more queries
    max_k: int

    @classmethod
    def of(cls, len_q: npt.ArrayLike, len_k: npt.ArrayLike, device: torch.device) -> RaggedBatch:
        """len_q, len_k: int[R], on the host; one object, where each req's queries are of its own keys."""
        cu_q_cpu = starts(len_q)
        cu_k_cpu = cu_q_cpu if len_k is len_q else starts(len_k)
        cu_q = cu_q_cpu.to(device)
        return cls(
            cu_q=cu_q,
            cu_k=cu_q if cu_k_cpu is cu_q_cpu else cu_k_cpu.to(device),
            cu_q_cpu=cu_q_cpu,
            cu_k_cpu=cu_k_cpu,
            max_q=int(np.max(len_q, initial=0)),
            max_k=int(np.max(len_k, initial=0)),
        )


def starts(lens: npt.ArrayLike) -> Tensor:
    """int[n] -> int32[n + 1] on the host: 0 and the running sum."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lens)]).astype(np.int32))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles(Generic[A]):
    """B tiles of L queries, as arrays on the host or tensors on the device. Padding tiles and queries see no key."""

    row: A  # int32[B]: the req
    token: A  # int32[B, L]: row of q; 0 for padding
    first_key: (
        A  # int32[B, L]: the query sees keys [first_key, last_key), by their place in the req; padding: an empty range
    )
    last_key: A  # int32[B, L]
    first_page: A  # int32[B]: page-table column that holds the tile's first key
    tree: A | None = None  # int32[B, L, W]: of its req's new tokens it sees these bits only

    def map(self, fn: Callable[[A], B]) -> Tiles[B]:
        return Tiles(
            row=fn(self.row),
            token=fn(self.token),
            first_key=fn(self.first_key),
            last_key=fn(self.last_key),
            first_page=fn(self.first_page),
            tree=None if self.tree is None else fn(self.tree),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanStatic:
    """The part of a plan that joins the compile key."""

    num_tokens: int
    num_reqs: int
    max_extend: int
    num_pages: int
    page_size: int
    num_chunks: tuple[tuple[int, ...], ...]  # per tile group, per block of tiles: chunks of keys to visit
    tree_words: int = 0  # W of the tree mask; 0: there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """`attn.plan`'s result: the batch on the device, and the reference's tiles. May alias the batch's tensors."""

    static: PlanStatic
    cu_extend: Tensor  # int32[R + 1]
    prefix_lens: Tensor  # int32[R]
    seq_lens: Tensor  # int32[R]
    page_table: Tensor  # int32[R, C]
    slot_mapping: Tensor  # int32[T]
    tiles: tuple[Tiles[Tensor], ...]
    tile_row: Tensor  # int32[T]: the row of each token among all tiles' queries, one past the last for padding
    tree_mask: Tensor | None = None  # int32[T, W], as the batch has it; the tiles have it with windows taken off

    def buffers(self) -> Iterator[Tensor]:
        """Every tensor, in a fixed order."""
        yield from (self.cu_extend, self.prefix_lens, self.seq_lens, self.page_table, self.slot_mapping, self.tile_row)
        if self.tree_mask is not None:
            yield self.tree_mask
        for t in self.tiles:
            yield from (t.row, t.token, t.first_key, t.last_key, t.first_page)
            if t.tree is not None:
                yield t.tree


@op("attn.plan", host=True)
def attn_plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """Plan one step for every layer of this spec. Host work, before the step.

    With `out`, an earlier plan of the same bucket, its buffers are filled in place and it is returned.
    """
    assert batch.tree_mask_cpu is None or spec.tree, "a tree mask, and the kernels were chosen for none: AttnSpec.tree"
    lengths = _tile_lengths(batch)
    groups = [_tiles(spec, batch, length, shorter) for length, shorter in zip(lengths, (0, *lengths), strict=False)]
    groups = [g for g in groups if batch.static or len(g.row)]
    plan = Plan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            num_chunks=tuple(_num_chunks(spec, batch, g) for g in groups),
            tree_words=0 if batch.tree_mask_cpu is None else batch.tree_mask_cpu.shape[1],
        ),
        cu_extend=batch.cu_extend_cpu.to(device),
        prefix_lens=batch.prefix_lens_cpu.to(device),
        seq_lens=batch.seq_lens_cpu.to(device),
        page_table=batch.page_table_cpu.to(device),
        slot_mapping=batch.slot_mapping_cpu.to(device),
        tiles=tuple(g.map(lambda x: torch.from_numpy(x).to(device)) for g in groups),
        tile_row=torch.from_numpy(_tile_row(batch, groups)).to(device),
        tree_mask=None if batch.tree_mask_cpu is None else batch.tree_mask_cpu.to(device),
    )
    if out is None:
        return plan
    assert out.static == plan.static, f"plan of another bucket: {plan.static} into {out.static}"
    for old, new in zip(out.buffers(), plan.buffers(), strict=True):
        old.copy_(new)
    return out


def pages_per_chunk(page_size: int) -> int:
    return max(1, KEYS_PER_CHUNK // page_size)


def tiles_per_block(spec: AttnSpec, length: int) -> int:
    """How many tiles of `length` queries are worked on at once."""
    kv = spec.num_kv_heads * max(spec.head_dim, spec.v_head_dim)
    return max(1, BLOCK_ELEMENTS // (KEYS_PER_CHUNK * max(kv, spec.num_heads * length)))


def _tile_lengths(batch: AttnBatch) -> tuple[int, ...]:
    """Tile lengths in use, ascending. A bucket has one, so that its shapes do not depend on who extends by how much."""
    longest = max(1, min(batch.max_extend, TILE_LENGTHS[-1]))
    if batch.static:
        return (longest,)
    return (*(length for length in TILE_LENGTHS if length < longest), longest)


def _tiles(spec: AttnSpec, batch: AttnBatch, length: int, shorter: int) -> Tiles[Ints]:
    """Tiles of the reqs that fit `length` and not `shorter`; the longest length takes what is longer still."""
    cu, prefix_lens, seq_lens = (x.numpy() for x in (batch.cu_extend_cpu, batch.prefix_lens_cpu, batch.seq_lens_cpu))
    extend = np.diff(cu)
    is_longest = length == min(batch.max_extend, TILE_LENGTHS[-1])
    chosen = (extend > shorter) & (is_longest | (extend <= length))
    tiles_of = np.where(chosen, -(-extend // length), 0)
    row = np.repeat(np.arange(batch.num_reqs, dtype=np.int32), tiles_of)
    first_tile = np.cumsum(tiles_of, dtype=np.int32) - tiles_of
    start = (np.arange(len(row), dtype=np.int32) - first_tile[row]) * length

    offset = start[:, None] + np.arange(length, dtype=np.int32)
    real = offset < extend[row, None]
    token, prefix = np.where(real, cu[row, None] + offset, 0), prefix_lens[row, None]
    last_key = np.minimum(seq_lens[row, None], prefix + offset + 1) if spec.causal else seq_lens[row, None]
    last_key = np.where(real, last_key, 0)
    first_key = np.zeros_like(last_key)
    mask = None if batch.tree_mask_cpu is None else batch.tree_mask_cpu.numpy()
    if spec.window is not None:
        first_key = prefix + offset - (spec.window - 1)
        if mask is not None:
            mask, depth, first_bit = within_window(mask, spec.window, cu)
            first_key = prefix + depth[token] - (spec.window - 1)
            first_key = np.where(first_key < prefix, first_key, prefix + first_bit[token])
        lowest = np.where(real, first_key, NO_KEY).min(1, keepdims=True)
        first_key = np.maximum(np.where(real, first_key, lowest), 0)  # padding: keys below may be freed, not to be read
    tiles = Tiles(
        row=row,
        token=token,
        first_key=first_key,
        last_key=last_key,
        first_page=first_key.min(1) // batch.page_size,
        tree=None if mask is None else mask[token],
    )
    order = np.argsort(-_tile_pages(tiles, batch.page_size), kind="stable")
    tiles = tiles.map(lambda x: x[order])
    return _pad(tiles, _max_tiles(batch, length)) if batch.static else tiles


def _tile_pages(tiles: Tiles[Ints], page_size: int) -> Ints:
    """int32[B]: pages from each tile's first key to its last."""
    pages: Ints = -(-tiles.last_key.max(1) // page_size) - tiles.first_page
    return pages


def _max_tiles(batch: AttnBatch, length: int) -> int:
    """Tiles that any batch of this bucket may need: a req of e tokens takes at most 1 + (e - 1) / length of them."""
    reqs = min(batch.num_reqs, batch.num_tokens)
    return min(reqs * -(-batch.max_extend // length), reqs + (batch.num_tokens - reqs) // length)


def _pad(tiles: Tiles[Ints], count: int) -> Tiles[Ints]:
    missing = count - len(tiles.row)
    return tiles.map(lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), np.int32)]))


def _num_chunks(spec: AttnSpec, batch: AttnBatch, tiles: Tiles[Ints]) -> tuple[int, ...]:
    """Chunks of keys each block of tiles visits: those of its first tile, which has the most."""
    length: int = tiles.token.shape[1]
    chunk, size = pages_per_chunk(batch.page_size), tiles_per_block(spec, length)
    if not batch.static:
        most = _tile_pages(tiles, batch.page_size)[::size]
        return tuple(-(-int(n) // chunk) for n in most)
    pages = batch.num_pages
    if spec.window is not None:  # unaligned, so one more page than the keys would fill
        new = length if batch.tree_mask_cpu is None else batch.max_extend  # any token of a tree may be a root
        pages = min(pages, (spec.window + new - 2) // batch.page_size + 2)
    return (-(-pages // chunk),) * -(-len(tiles.row) // size)


def _tile_row(batch: AttnBatch, groups: list[Tiles[Ints]]) -> Ints:
    """int32[T]: where each token's result is among the tiles' queries laid end to end."""
    total = sum(g.token.size for g in groups)
    rows = np.full(batch.num_tokens, total, np.int32)
    base = 0
    for g in groups:
        real = (g.last_key > g.first_key).ravel()
        rows[g.token.ravel()[real]] = base + np.flatnonzero(real)
        base += g.token.size
    return rows
