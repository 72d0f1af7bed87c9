"""attn.plan and attn.mla_plan: the batch as it is, and which of its reqs have pages in common. The kernel cuts its own work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang_core.api.ops import AttnBatch, AttnSpec, MLASpec, Plan, PlanStatic

COLUMNS = 64  # of a page table, zeros past the pages there are
LEAST_SHARED = 128  # keys; kLeastShared of csrc/attention_shared.inl
MOST_ROWS = 48  # queries x heads a KV head, half a tile of attention_tiled.inl: a req with more fills tiles of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class XeonPlan(Plan):
    """`sharing` is int32[2, R]: the reqs in an order that has those with the same leading pages side by side, and how many of these
    pages each has in common with the one before it. None: nobody looked. Of these pages this step writes none."""

    sharing: Tensor | None = None

    def buffers(self) -> Iterator[Tensor]:
        yield from Plan.buffers(self)
        if self.sharing is not None:
            yield self.sharing


def plan(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """Keys that reqs share are visited once for all of them: bits of a req's result depend on who they are."""
    return _plan(batch, torch.from_numpy(find_sharing(spec, batch)), out)


def plan_invariant(spec: AttnSpec | MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """Every req for itself."""
    return _plan(batch, None, out)


def find_sharing(spec: AttnSpec | MLASpec, batch: AttnBatch) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """-> `XeonPlan.sharing`. No req shares anything under a window, whose keys are not the leading ones, or without an order of keys."""
    attn = spec.latent if isinstance(spec, MLASpec) else spec
    sharing = np.zeros((2, batch.num_reqs), np.int32)
    sharing[0] = np.arange(batch.num_reqs)
    if not attn.causal or attn.window is not None:
        return sharing
    page_size, table = batch.page_size, batch.page_table_cpu.numpy()
    prefix_lens, seq_lens = batch.prefix_lens_cpu.numpy(), batch.seq_lens_cpu.numpy()
    rows = np.diff(batch.cu_extend_cpu.numpy()) * (attn.num_heads // attn.num_kv_heads)
    whole = np.minimum(prefix_lens, seq_lens - 1) // page_size  # pages that this step only reads
    least = -(-LEAST_SHARED // page_size)
    reqs = np.flatnonzero((whole >= least) & (rows <= MOST_ROWS))
    if len(reqs) < 2:
        return sharing
    # Most batches share nothing, and one column shows it.
    _, first, count = np.unique(table[reqs, least - 1], return_inverse=True, return_counts=True)
    reqs = reqs[count[first] > 1]
    if len(reqs) == 0:
        return sharing
    # Pages of its own stand for those that are not whole, and in a last column, so that any two tables differ somewhere.
    width = int(whole[reqs].max())
    own = -1 - reqs[:, None]
    pages = np.where(np.arange(width) < whole[reqs, None], table[reqs, :width], own)
    pages = np.concatenate([pages, own], axis=1, dtype=np.int32)
    order = np.argsort(
        pages.view(np.dtype((np.void, pages.itemsize * pages.shape[1])))[:, 0]
    )  # rows as bytes: equal ones meet
    pages, reqs = pages[order], reqs[order]
    sharing[0] = np.concatenate([reqs, np.setdiff1d(sharing[0], reqs)])
    sharing[1, 1 : len(reqs)] = (pages[1:] != pages[:-1]).argmax(1)
    return sharing


def _plan(batch: AttnBatch, sharing: Tensor | None, out: Plan | None) -> Plan:
    """Page tables grow by COLUMNS at a time, so that a step whose reqs have grown by a page still has the shape of the one before."""
    num_pages = batch.num_pages if batch.static else -(-batch.num_pages // COLUMNS) * COLUMNS
    page_table = batch.page_table_cpu.contiguous()
    if num_pages > batch.num_pages:
        page_table = torch.nn.functional.pad(page_table, (0, num_pages - batch.num_pages))
    made = XeonPlan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=num_pages,
            page_size=batch.page_size,
            num_chunks=(),
            tree_words=0 if batch.tree_mask_cpu is None else batch.tree_mask_cpu.shape[1],
        ),
        cu_extend=batch.cu_extend_cpu,
        prefix_lens=batch.prefix_lens_cpu,
        seq_lens=batch.seq_lens_cpu,
        page_table=page_table,
        slot_mapping=batch.slot_mapping_cpu,
        tiles=(),
        tile_row=batch.slot_mapping_cpu[:0],
        tree_mask=None if batch.tree_mask_cpu is None else batch.tree_mask_cpu.contiguous(),
        sharing=sharing,
    )
    if out is None:
        return made
    assert out.static == made.static, f"plan of another bucket: {made.static} into {out.static}"
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    return out
