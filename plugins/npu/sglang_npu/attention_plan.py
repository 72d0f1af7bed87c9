"""attn.plan and attn.mla_plan: which tokens attend in which call of the vendor's op, with page tables on the device and lengths on the host.

A query of one token and a longer one are two ops in one name, with other limits (`npu_fused_infer_attention_score_v2`). Those of one token go in one
call, each a row of its own. A longer one is a span with a call to itself, where pages are as the op wants them for that; elsewhere,
and in a bucket, each of its tokens is a row too, which sees the keys up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglang_core.api.ops import AttnBatch, AttnSpec, MLASpec, Plan, PlanStatic

Ints = npt.NDArray[np.int32]
SPAN_PAGES = 128  # a span's pages hold a multiple of so many tokens,
SPAN_LONGEST_PAGE = 512  # and no more than so many
LATENT_BLOCKS = (128, 16)  # tokens in a block of latents, the better first


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """B queries of one token."""

    tokens: Tensor | None  # int32[B]: their rows among the step's; None: all, in order
    table: Tensor  # int32[B, C]: blocks
    lens_cpu: Tensor  # int32[B] on the host, at least 1: keys that each sees
    live: Tensor  # bool[B, 1, 1]: it belongs to a req


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A query of several tokens, the rows [start, stop) of the step's."""

    start: int
    stop: int
    table: Tensor  # int32[1, C]
    num_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NpuPlan(Plan):
    """The batch on the device, and its calls."""

    rows: Rows | None
    spans: tuple[Span, ...]


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`."""
    takes_spans = not batch.static and batch.page_size % SPAN_PAGES == 0 and batch.page_size <= SPAN_LONGEST_PAGE
    return _plan(batch, device, out, block=batch.page_size, takes_spans=takes_spans)


def latent_plan(spec: MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.mla_plan`: rows alone. Core expands the latents of long extends, for which a call is documented up to 16 tokens."""
    block = latent_block(batch.page_size)
    assert block is not None, f"pages of {batch.page_size} tokens, and blocks hold {LATENT_BLOCKS}"
    return _plan(batch, device, out, block=block, takes_spans=False)


def latent_block(page_size: int) -> int | None:
    """Tokens in a block of latents, of which a page is one or several; None: there is no such block."""
    return next((block for block in LATENT_BLOCKS if page_size % block == 0), None)


def _plan(batch: AttnBatch, device: torch.device, out: Plan | None, *, block: int, takes_spans: bool) -> Plan:
    cu, prefix = batch.cu_extend_cpu.numpy(), batch.prefix_lens_cpu.numpy()
    extend = np.diff(cu)
    table = split(batch.page_table_cpu.numpy(), batch.page_size // block)
    spanned = np.flatnonzero(extend > 1) if takes_spans else np.empty(0, np.int64)
    token = np.arange(batch.num_tokens, dtype=np.int32)
    req = np.searchsorted(cu[1:], token, side="right")
    live = req < batch.num_reqs
    req = np.where(live, req, 0)
    in_rows = ~(live & np.isin(req, spanned))
    slot_mapping = batch.slot_mapping_cpu.to(device)
    made = NpuPlan(
        static=PlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            num_pages=batch.num_pages,
            page_size=batch.page_size,
            num_chunks=(),
        ),
        cu_extend=batch.cu_extend_cpu.to(device),
        prefix_lens=batch.prefix_lens_cpu.to(device),
        seq_lens=batch.seq_lens_cpu.to(device),
        page_table=batch.page_table_cpu.to(device),
        slot_mapping=slot_mapping,
        tiles=(),
        tile_row=slot_mapping.new_empty(0),
        rows=_rows(token[in_rows], req[in_rows], live[in_rows], cu, prefix, table, len(spanned) == 0, device),
        spans=tuple(
            Span(
                start=int(cu[r]),
                stop=int(cu[r + 1]),
                table=torch.from_numpy(table[r : r + 1]).to(device),
                num_keys=int(prefix[r] + extend[r]),
            )
            for r in spanned
        ),
    )
    return made if out is None else _refill(out, made)


def split(table: Ints, blocks: int) -> Ints:
    """int32[R, C] of pages -> int32[R, C * blocks] of the blocks that they are."""
    return (table[:, :, None] * blocks + np.arange(blocks, dtype=np.int32)).reshape(len(table), -1)


def _rows(
    token: Ints,
    req: Ints,
    live: npt.NDArray[np.bool_],
    cu: Ints,
    prefix: Ints,
    table: Ints,
    every: bool,
    device: torch.device,
) -> Rows | None:
    """`every`: these are all tokens of the step."""
    if not len(token):
        return None
    seen = prefix[req] + token - cu[req] + 1
    return Rows(
        tokens=None if every else torch.from_numpy(token).to(device),
        table=torch.from_numpy(np.where(live[:, None], table[req], 0).astype(np.int32)).to(device),
        lens_cpu=torch.from_numpy(np.where(live, seen, 1).astype(np.int32)),
        live=torch.from_numpy(live[:, None, None]).to(device),
    )


def _refill(out: Plan, made: NpuPlan) -> Plan:
    """`out`, of the same bucket, with the numbers of `made`."""
    assert isinstance(out, NpuPlan) and out.static == made.static, (
        f"plan of another bucket: {made.static} into {out.static}"
    )
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    if out.rows is not None and made.rows is not None:
        for name in ("table", "lens_cpu", "live"):
            getattr(out.rows, name).copy_(getattr(made.rows, name))
    return out
