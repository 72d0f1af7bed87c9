"""attn.plan and attn.mla_plan: a step as a list of work, made on the host.

New tokens are cut into tiles: some tokens of one req, times the query heads that share a KV head, are the rows of one matrix. Tiles
come in tiers by their number of rows; a req belongs to the first tier that holds all its rows, the long ones to the last. The keys
of a tile may be cut into splits, so that few reqs with long contexts still fill the device; each split is an item, and a merge for
each token says which results belong together. Items are sorted, longest first: programs take them in turn.

How tiles are split: `plan` looks at the whole batch and evens out the work (it is then not batch invariant);
`plan_invariant` looks at a tile alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglang_core.api import one_transfer
from sglang_core.api.ops import AttnBatch, AttnSpec, MLASpec, Plan, PlanStatic
from sglang_triton.tree_windows import tree_windows

Ints = npt.NDArray[np.int64]

FIELDS = 8  # int32 of a record; items and merges alike
AOT = ()  # nothing to compile: it is host work
MERGES = FIELDS - 1  # in record 0
ALIGN = 128  # splits begin at multiples of it, and so do blocks of keys: one never straddles two pages of 128 or less
ROWS = (16, 64, 128)  # of the tiers; 16 is the least that matrix units take
TALL_ROWS = (16, 64, 256)
LATENT_ROWS = (16, 64)  # a row's accumulator is as wide as the latent
TALL_LATENT_ROWS = (16, 128)
MIN_SPLIT = 256  # keys, where a tile is looked at alone: less costs more to merge than it saves
MAX_SPLITS = 16
BALANCED_UNITS = 4  # items times heads that splitting may lead to, for each program that runs at once
OVERHEAD = 64  # what a split costs beside its keys, in keys: its start, its result written and read again
LATENT_OVERHEAD = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Where the items of tiles of one size stand in the work list."""

    rows: int
    tokens: int  # of one tile
    first: int  # record
    capacity: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkStatic(PlanStatic):
    tiers: tuple[Tier, ...]
    first_merge: int
    num_merges: int  # that there is room for; 0: nothing is split
    num_parts: int  # rows of results of splits, a token each


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkPlan(Plan):
    """`work` is int32[n, FIELDS]. Record 0 counts: items of each tier, then merges (in its last field)."""

    static: WorkStatic
    work: Tensor
    first_key: Tensor | None = (
        None  # int32[T]: under a window and a tree mask, which then is without keys out of the window
    )

    def buffers(self) -> Any:
        yield from Plan.buffers(self)
        yield self.work
        if self.first_key is not None:
            yield self.first_key


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one tier, as int64[n] each."""

    token: Ints
    count: Ints
    req: Ints
    position: Ints
    clip: Ints  # the first key that any of its tokens sees
    end: Ints

    @property
    def begin(self) -> Ints:
        return self.clip // ALIGN * ALIGN

    @property
    def keys(self) -> Ints:
        return np.maximum(self.end - self.begin, 0)


def plan(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """Splits even out the work of the batch over the device."""
    return _plan(spec, batch, device, out, invariant=False)


def plan_tall(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `plan`, for a kernel whose programs have TALL_ROWS[-1] rows."""
    return _plan(spec, batch, device, out, invariant=False, ladder=TALL_ROWS)


def plan_latents_tall(spec: MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `plan`, for a kernel whose programs have TALL_LATENT_ROWS[-1] rows and half of a result's columns."""
    return _plan(spec, batch, device, out, invariant=False, ladder=TALL_LATENT_ROWS, shares=2)


def plan_invariant(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """A req's keys are cut in the same places in whatever company it is."""
    return _plan(spec, batch, device, out, invariant=True)


def _plan(
    spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None, *, invariant: bool,
    ladder: tuple[int, ...] | None = None, shares: int = 1,
) -> Plan:  # fmt: skip
    """`ladder`: rows of the tiers, where they are not the usual ones; `shares`: programs that do the same rows of its last tier."""
    latent = isinstance(spec, MLASpec)
    ladder = ladder or (LATENT_ROWS if latent else ROWS)
    attn = spec.latent if isinstance(spec, MLASpec) else spec
    assert batch.tree_mask_cpu is None or attn.tree, "a tree mask, and the kernels were chosen for none: AttnSpec.tree"
    tree, first_key = tree_windows(attn.window, batch)
    group = attn.num_heads // attn.num_kv_heads
    sizes = _tier_rows(ladder, group, batch)
    counts = np.zeros((1, FIELDS), np.int64)
    records, merges, tiers = [counts], [], []
    first, num_parts, shorter = 1, 0, 0
    room = Room(0, 0, 0)
    for i, rows in enumerate(sizes):
        last = i == len(sizes) - 1
        tier = Shape(
            rows=rows,
            tokens=max(1, rows // group),
            shorter=shorter,
            last=last,
            units=attn.num_kv_heads * -(-group // rows) * (shares if rows == ladder[-1] else 1),
            programs=num_programs(device, rows, latent=latent),
            overhead=LATENT_OVERHEAD if latent else OVERHEAD,
        )
        tiles = _tiles(attn, batch, first_key, tier)
        splits = _splits_alone(tiles.keys, tier) if invariant else _splits_balanced(tiles.keys, tier)
        items, merge, num_parts = _items(tiles, splits, num_parts)
        need = _room(batch, tier, invariant=invariant) if batch.static else Room(len(items), len(merge), 0)
        counts[0, i] = len(items)
        records.append(_padded(items, need.items))
        merges.append(merge)
        tiers.append(Tier(rows=rows, tokens=tier.tokens, first=first, capacity=need.items))
        first, shorter = first + need.items, tier.tokens
        room = Room(room.items + need.items, room.merges + need.merges, room.parts + need.parts)
    merged = np.concatenate(merges)
    counts[0, MERGES] = len(merged)
    static = WorkStatic(
        num_tokens=batch.num_tokens,
        num_reqs=batch.num_reqs,
        max_extend=batch.max_extend,
        num_pages=batch.num_pages,
        page_size=batch.page_size,
        num_chunks=(),
        tree_words=0 if tree is None else tree.shape[1],
        tiers=tuple(tiers),
        first_merge=first,
        num_merges=room.merges,
        num_parts=room.parts if batch.static else num_parts,
    )
    records.append(_padded(merged, room.merges))
    work = torch.from_numpy(np.concatenate(records).astype(np.int32))
    made = _on_device(batch, device, static, work, tree, first_key)
    if out is None:
        return made
    assert out.static == static, f"plan of another bucket: {static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out


def num_programs(device: torch.device, rows: int, *, latent: bool) -> int:
    """How many programs of attention run at once on the device."""
    return num_processors(device) * (1 if latent else {16: 3, 64: 2}.get(rows, 1))


def merge_programs(device: torch.device) -> int:
    return num_processors(device) * 8  # small ones, which wait for memory most of the time


@functools.cache
def num_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # interpreted, one after the other: some, so that work is shared out
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is common to the tiles of a tier."""

    rows: int
    tokens: int  # a tile holds at most so many
    shorter: int  # reqs that extend by so many or less belong to an earlier tier
    last: bool
    units: int  # programs that an item is worked on by: KV heads, times blocks of their queries
    programs: int  # that run at once
    overhead: int


@dataclass(frozen=True, slots=True)
class Room:
    """How many items, merges and rows of partial results there may be."""

    items: int
    merges: int
    parts: int


def _tier_rows(ladder: tuple[int, ...], group: int, batch: AttnBatch) -> tuple[int, ...]:
    """Tiers that the batch may need: up to the first that holds the longest extend. Each holds a whole token."""
    fits = [rows for rows in ladder if rows >= group] or [ladder[-1]]
    needed = [
        rows for rows, before in zip(fits, (0, *fits), strict=False) if before // group < max(batch.max_extend, 1)
    ]
    return tuple(needed)


def _tiles(spec: AttnSpec, batch: AttnBatch, first_key: Tensor | None, tier: Shape) -> Tiles:
    """Tiles of the reqs that belong to the tier. Tokens of no req are tiles without keys in the last one."""
    cu, prefix, seq = (
        x.numpy().astype(np.int64) for x in (batch.cu_extend_cpu, batch.prefix_lens_cpu, batch.seq_lens_cpu)
    )
    extend = np.diff(cu)
    chosen = (extend > tier.shorter) & ((extend <= tier.tokens) | tier.last)
    start, length = cu[:-1][chosen], extend[chosen]
    req, seq = np.flatnonzero(chosen), seq[chosen]
    before = np.zeros_like(seq) if spec.cross else prefix[chosen]
    if tier.last:
        start, length = np.append(start, cu[-1]), np.append(length, batch.num_tokens - cu[-1])
        req, seq, before = np.append(req, 0), np.append(seq, 0), np.append(before, 0)
    tiles_of = -(-length // tier.tokens)
    row = np.repeat(np.arange(len(req)), tiles_of)
    offset = (np.arange(len(row)) - (np.cumsum(tiles_of) - tiles_of)[row]) * tier.tokens
    count = np.minimum(length[row] - offset, tier.tokens)
    token, position = start[row] + offset, before[row] + offset
    end = np.minimum(seq[row], position + count) if spec.causal else seq[row]
    clip = np.zeros_like(position)
    if first_key is not None and len(row):
        keys = np.append(first_key.numpy(), 0)  # so that a tile may end with the last token
        clip = np.minimum.reduceat(keys, np.stack([token, token + count], 1).ravel())[::2].astype(np.int64)
    elif spec.window is not None:
        clip = np.maximum(position - (spec.window - 1), 0)
    return Tiles(token, count, req[row], position, np.minimum(clip, end), end)


def _splits_alone(keys: Ints, tier: Shape) -> Ints:
    """int64[n]: keys of a split of each tile; a power of two, so that it rarely changes while a req grows."""
    least = _least_split(tier)
    return np.maximum(least, 1 << _log2_up(-(-keys // MAX_SPLITS)))


def _least_split(tier: Shape) -> int:
    return MIN_SPLIT * tier.rows // ROWS[0]


def _log2_up(x: Ints) -> Ints:
    return np.ceil(np.log2(np.maximum(x, 1))).astype(np.int64)


def _splits_balanced(keys: Ints, tier: Shape) -> Ints:
    """int64[n]: keys of a split, the same for all tiles: what is expected to end soonest.

    Either all programs do about as many rounds of whole splits, or they share all keys and the last one ends a split later.
    """
    longest, tiles, total = int(keys.max(initial=0)), len(keys), int(keys.sum())
    best, best_time = max(longest, 1), float("inf")
    for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        size = -(-longest // (parts * ALIGN)) * ALIGN
        if size == 0:
            break
        count = int(np.maximum(-(-keys // size), 1).sum())
        if count - tiles > _extra_items(tier):
            break
        cost = min(size, longest) + (tier.overhead if count > tiles else 0)
        rounds = -(-count * tier.units // tier.programs) * cost
        shared = (total + (count - tiles) * tier.overhead) * tier.units / tier.programs + cost
        if min(rounds, shared) < best_time:
            best, best_time = size, min(rounds, shared)
    return np.full(tiles, best, np.int64)


def _extra_items(tier: Shape) -> int:
    """How many items there may be beyond one a tile."""
    return -(-BALANCED_UNITS * tier.programs // tier.units)


def _items(tiles: Tiles, split: Ints, num_parts: int) -> tuple[Ints, Ints, int]:
    """-> items and merges, int64[n, FIELDS] each, and how many rows of partial results are in use."""
    splits = np.maximum(-(-tiles.keys // split), 1)
    tile = np.repeat(np.arange(len(splits)), splits)
    index = np.arange(len(tile)) - (np.cumsum(splits) - splits)[tile]
    several = splits > 1
    parts = np.where(several, splits * tiles.count, 0)
    part = num_parts + np.cumsum(parts) - parts
    begin = tiles.begin[tile] + index * split[tile]
    end = np.minimum(tiles.end[tile], begin + split[tile])
    where = np.where(several[tile], part[tile] + index * tiles.count[tile], -1)
    items = np.stack(
        [
            tiles.token[tile],
            tiles.count[tile],
            tiles.req[tile],
            tiles.position[tile],
            begin,
            end,
            tiles.clip[tile],
            where,
        ],
        1,
    )
    items = items[np.argsort(begin - end, kind="stable")]

    mine = np.repeat(np.flatnonzero(several), tiles.count[several])
    step = np.arange(len(mine)) - (np.cumsum(tiles.count[several]) - tiles.count[several]).repeat(tiles.count[several])
    merges = np.zeros((len(mine), FIELDS), np.int64)
    merges[:, :4] = np.stack([tiles.token[mine] + step, splits[mine], part[mine] + step, tiles.count[mine]], 1)
    return items, merges, num_parts + int(parts.sum())


def _room(batch: AttnBatch, tier: Shape, *, invariant: bool) -> Room:
    """What any batch of this bucket may need. A req of e tokens makes at most 1 + (e - 1) / tier.tokens tiles."""
    reqs = min(batch.num_reqs, batch.num_tokens // (tier.shorter + 1))
    tiles = reqs + 1 + batch.num_tokens // tier.tokens if tier.last else reqs
    tiles = min(tiles, batch.num_tokens)
    keys = batch.num_pages * batch.page_size
    if invariant:
        most = min(MAX_SPLITS, -(-(keys + ALIGN) // _least_split(tier)))
        return Room(tiles * most, batch.num_tokens, batch.num_tokens * most) if most > 1 else Room(tiles, 0, 0)
    extra = _extra_items(tier) if keys > ALIGN else 0
    return Room(tiles + extra, min(batch.num_tokens, tier.tokens * extra), 2 * tier.tokens * extra)


def _padded(records: Ints, count: int) -> Ints:
    assert len(records) <= count, f"{len(records)} records of work, and room for {count}"
    return np.concatenate([records, np.zeros((count - len(records), FIELDS), np.int64)])


def _on_device(
    batch: AttnBatch,
    device: torch.device,
    static: WorkStatic,
    work: Tensor,
    tree: Tensor | None,
    first_key: Tensor | None,
) -> WorkPlan:
    host = {
        "cu_extend": batch.cu_extend_cpu,
        "prefix_lens": batch.prefix_lens_cpu,
        "seq_lens": batch.seq_lens_cpu,
        "page_table": batch.page_table_cpu.contiguous(),
        "slot_mapping": batch.slot_mapping_cpu,
        "work": work,
    }
    host |= {name: x for name, x in {"tree_mask": tree, "first_key": first_key}.items() if x is not None}
    placed = dict(zip(host, one_copy(list(host.values()), device), strict=True))
    return WorkPlan(static=static, tiles=(), tile_row=placed["slot_mapping"][:0], **placed)


def one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """int32 host tensors on the device, by one transfer that the host does not wait for."""
    if device.type == "cpu":
        return tensors
    return one_transfer([x.int().numpy() for x in tensors], device, _pinned)


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
