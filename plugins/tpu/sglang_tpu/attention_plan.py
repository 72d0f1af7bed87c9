"""attn.plan and attn.mla_plan: a step as a list of items, made on the host. Imports no jax.

New tokens stand packed, and are cut into blocks of `block` tokens wherever reqs begin and end. An item is what one req has in one block:
neighbouring rows of the block, and the pages of the keys that they see. The kernel goes through the items in order, so
that those of one block follow one another, and only the items that are there cost time: their number is no part of a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, MLASpec, Plan, PlanStatic

Ints = npt.NDArray[np.int32]
P = TypeVar("P", bound=Plan)

# int32 of an item. Positions count from the req's first token; rows from the block's.
FIELDS = BLOCK, REQ, FIRST_ROW, END_ROW, POSITION, END_KEY, FIRST_PAGE, END_PAGE = range(8)
MAX_TOKENS = 128  # of a block
MAX_ROWS = 512  # of one KV head: a key in the matrix unit meets so many queries, which hides that it was loaded
MAX_HEAD_ROWS = 4096  # of all heads: their accumulators are in VMEM


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemStatic(PlanStatic):
    block: int  # tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemPlan(Plan):
    """`attn.plan`'s result for the kernels of this package, with the reference's tiles in it.

    A watched step moves a plan to the device, and then gives it to a kernel and to the op's body, to compare them.
    """

    static: ItemStatic
    items: Tensor  # int32[I * len(FIELDS)]
    count: Tensor  # int32[1]: items that are there. At least 1, which may have neither rows nor pages
    live: Tensor  # int32[T]: 1 where a token is of a req that has keys

    def buffers(self) -> Iterator[Tensor]:
        yield from Plan.buffers(self)
        yield from (self.items, self.count, self.live)


def plan(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: ItemPlan | None = None) -> ItemPlan:
    """Raises nothing for what a batch may be; `spec` is one that the kernel supports."""
    attn = spec.latent if isinstance(spec, MLASpec) else spec
    block = block_tokens(attn, batch.max_extend)
    items, live = _items(attn, batch, block)
    count = max(1, len(items))
    room = batch.num_tokens if block == 1 else -(-batch.num_tokens // block) + batch.num_reqs
    padded = np.zeros((max(room if batch.static else count, 1), len(FIELDS)), np.int32)
    padded[: len(items)] = items
    tiled = OPS["attn.plan"].body(attn, batch, device)
    made = ItemPlan(
        static=ItemStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            num_chunks=tiled.static.num_chunks,
            block=block,
        ),
        cu_extend=tiled.cu_extend,
        prefix_lens=tiled.prefix_lens,
        seq_lens=tiled.seq_lens,
        page_table=tiled.page_table,
        slot_mapping=tiled.slot_mapping,
        tiles=tiled.tiles,
        tile_row=tiled.tile_row,
        items=torch.from_numpy(padded.ravel()).to(device),
        count=torch.tensor([count], dtype=torch.int32, device=device),
        live=torch.from_numpy(live).to(device),
    )
    return made if out is None else refilled(out, made)


def refilled(out: P, made: P) -> P:
    """An earlier plan of the same bucket, with what is in `made`."""
    assert out.static == made.static, f"plan of another bucket: {made.static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out


def block_tokens(spec: AttnSpec, max_extend: int) -> int:
    """A power of two: 1 where every req decodes, else as many as a req may have, or as VMEM has room for."""
    group = spec.num_heads // spec.num_kv_heads
    most = max(1, min(MAX_TOKENS, MAX_ROWS // group, MAX_HEAD_ROWS // spec.num_heads))
    return 1 << (min(1 << (most.bit_length() - 1), max(1, max_extend)) - 1).bit_length()


def _items(spec: AttnSpec, batch: AttnBatch, block: int) -> tuple[Ints, Ints]:
    """-> the items that are there, int32[n, len(FIELDS)], and `live`."""
    cu, prefix_lens, seq_lens = (x.numpy() for x in (batch.cu_extend_cpu, batch.prefix_lens_cpu, batch.seq_lens_cpu))
    extend = np.where(seq_lens > 0, np.diff(cu), 0)
    first = cu[:-1] // block
    blocks_of = np.where(extend > 0, (cu[1:] - 1) // block - first + 1, 0)
    req = np.repeat(np.arange(batch.num_reqs, dtype=np.int32), blocks_of)
    begin = np.cumsum(blocks_of, dtype=np.int32) - blocks_of
    index = first[req] + np.arange(len(req), dtype=np.int32) - begin[req]
    first_row = np.maximum(cu[req] - index * block, 0)
    end_row = np.minimum(cu[req + 1] - index * block, block)
    position = prefix_lens[req] + index * block - cu[req]  # of the block's first row, were it of this req
    end_key = np.minimum(seq_lens[req], position + end_row) if spec.causal else seq_lens[req]
    first_key = np.zeros_like(position)
    if spec.window is not None:
        first_key = np.maximum(position + first_row - (spec.window - 1), 0)
    first_page, end_page = first_key // batch.page_size, -(-end_key // batch.page_size)
    items = np.stack([index, req, first_row, end_row, position, end_key, first_page, end_page], axis=1)
    live = np.zeros(batch.num_tokens, np.int32)
    live[: cu[-1]] = np.repeat((seq_lens > 0).astype(np.int32), np.diff(cu))
    return items.astype(np.int32), live
