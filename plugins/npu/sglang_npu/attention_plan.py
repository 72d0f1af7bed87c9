"""attn.plan and attn.mla_plan: which tokens attend in which call of the vendor's op, with page tables on the device and lengths on the host.

A query of one token and a longer one are two ops in one name, with other limits (`npu_fused_infer_attention_score_v2`). Those of one token go in one
call, each a row of its own. Longer ones are spans, where pages are as the op wants them for that: one a call, or with `packed_plan` all of a step's
queries in one. Elsewhere, and in a bucket, each token is a row, which sees the keys up to its own.

Where there is a window, a table begins with the block that holds the first key seen, and lengths count from there: blocks behind it may be anybody's.
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
MOST_PACKED = 4096  # queries in one call


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """B queries of one token."""

    tokens: Tensor | None  # int32[B]: their rows among the step's; None: all, in order
    table: Tensor  # int32[B, C]: blocks
    lens_cpu: Tensor  # int32[B] on the host, at least 1: keys that each sees
    live: Tensor  # bool[B, 1, 1]: it belongs to a req
    hidden: Tensor | None  # bool[B, 1, 1, C * block]: keys that the window has left behind; None: there is no window


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """S queries of several tokens, together the rows [start, stop) of the step's. Each sees its `num_keys` up to its last token's own."""

    start: int
    stop: int
    ends: list[int]  # of each query's rows, counted from `start`
    num_keys: list[int]
    table: Tensor  # int32[S, C]


@dataclass(frozen=True, kw_only=True, slots=True)
class NpuPlan(Plan):
    """The batch on the device, and its calls."""

    rows: Rows | None
    spans: tuple[Span, ...]


def plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`."""
    cuts = _Cuts(block=batch.page_size, window=spec.window, per_call=1 if _takes_spans(spec, batch) else 0)
    return _plan(cuts, batch, device, out)


def packed_plan(spec: AttnSpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.plan`, of queries that may share a call."""
    cuts = _Cuts(block=batch.page_size, window=spec.window, per_call=MOST_PACKED if _takes_spans(spec, batch) else 0)
    return _plan(cuts, batch, device, out)


def latent_plan(spec: MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """As `attn.mla_plan`: rows alone. Core expands the latents of long extends, for which a call is documented up to 16 tokens."""
    block = latent_block(batch.page_size)
    assert block is not None, f"pages of {batch.page_size} tokens, and blocks hold {LATENT_BLOCKS}"
    return _plan(_Cuts(block=block), batch, device, out)


def latent_block(page_size: int) -> int | None:
    """Tokens in a block of latents, of which a page is one or several; None: there is no such block."""
    return next((block for block in LATENT_BLOCKS if page_size % block == 0), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cuts:
    """How a batch becomes calls."""

    block: int  # tokens
    window: int | None = None
    per_call: int = 0  # longer queries in one call; 0: each of their tokens is a row


def _takes_spans(spec: AttnSpec, batch: AttnBatch) -> bool:
    """Codes are made numbers before longer queries attend over them, so that their pages may be of any size."""
    suits = batch.page_size % SPAN_PAGES == 0 and batch.page_size <= SPAN_LONGEST_PAGE
    return not batch.static and (suits or spec.kv_dtype == "int8")


def _plan(cuts: _Cuts, batch: AttnBatch, device: torch.device, out: Plan | None) -> Plan:
    cu, prefix = batch.cu_extend_cpu.numpy(), batch.prefix_lens_cpu.numpy()
    extend = np.diff(cu)
    table = split(batch.page_table_cpu.numpy(), batch.page_size // cuts.block)
    spanned = _spanned(cuts, extend)
    token = np.arange(batch.num_tokens, dtype=np.int32)
    req = np.searchsorted(cu[1:], token, side="right")
    live = req < batch.num_reqs
    req = np.where(live, req, 0)
    in_rows = ~(live & np.isin(req, spanned))
    seen = np.where(live, prefix[req] + token - cu[req] + 1, 1)
    slot_mapping = batch.slot_mapping_cpu.to(device)
    parts = [spanned[i : i + cuts.per_call] for i in range(0, len(spanned), max(1, cuts.per_call))]
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
        rows=_rows(
            cuts,
            None if in_rows.all() else token[in_rows],
            np.where(live[in_rows, None], table[req[in_rows]], 0),
            seen[in_rows],
            live[in_rows],
            device,
        ),
        spans=tuple(_span(cuts, cu[part], cu[part + 1], prefix[part], table[part], device) for part in parts),
    )
    return made if out is None else _refill(out, made)


def _spanned(cuts: _Cuts, extend: Ints) -> npt.NDArray[np.intp]:
    """The reqs that spans are of. Where several share a call, those of one token come along with longer ones."""
    if not cuts.per_call or not (extend > 1).any():
        return np.empty(0, np.intp)
    return np.flatnonzero(extend > (0 if cuts.per_call > 1 else 1))


def split(table: Ints, blocks: int) -> Ints:
    """int32[R, C] of pages -> int32[R, C * blocks] of the blocks that they are."""
    return (table[:, :, None] * blocks + np.arange(blocks, dtype=np.int32)).reshape(len(table), -1)


def _rows(
    cuts: _Cuts, token: Ints | None, table: Ints, seen: Ints, live: npt.NDArray[np.bool_], device: torch.device
) -> Rows | None:
    """token: [B] or None for all of the step's, table: [B, C], seen: the keys up to each one's own."""
    if not len(seen):
        return None
    hidden = None
    if cuts.window is not None:
        table, behind = _behind(cuts, table, seen - cuts.window, columns=-(-(cuts.window - 1) // cuts.block) + 1)
        seen = seen - behind
        place = torch.arange(table.shape[1] * cuts.block, dtype=torch.int32, device=device)
        hidden = place < _on(seen - cuts.window, device)[:, None, None, None]
    return Rows(
        tokens=None if token is None else _on(token, device),
        table=_on(table, device),
        lens_cpu=torch.from_numpy(seen.astype(np.int32)),
        live=torch.from_numpy(live[:, None, None]).to(device),
        hidden=hidden,
    )


def _span(cuts: _Cuts, start: Ints, stop: Ints, prefix: Ints, table: Ints, device: torch.device) -> Span:
    """start, stop, prefix: [S], table: [S, C]"""
    keys = prefix + stop - start
    if cuts.window is not None:
        table, behind = _behind(cuts, table, prefix + 1 - cuts.window, columns=table.shape[1])
        keys = keys - behind
    return Span(
        start=int(start[0]),
        stop=int(stop[-1]),
        ends=(stop - start[0]).tolist(),
        num_keys=keys.tolist(),
        table=_on(table, device),
    )


def _behind(cuts: _Cuts, table: Ints, first: Ints, *, columns: int) -> tuple[Ints, Ints]:
    """-> the table from the block on that holds the key `first` (below 0: the first of all), and how many keys are before that block."""
    column = np.maximum(first, 0) // cuts.block
    at = np.minimum(column[:, None] + np.arange(min(columns, table.shape[1])), table.shape[1] - 1)
    return np.take_along_axis(table, at, axis=1), column * cuts.block


def _on(numbers: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32)).to(device)


def _refill(out: Plan, made: NpuPlan) -> Plan:
    """`out`, of the same bucket, with the numbers of `made`."""
    assert isinstance(out, NpuPlan) and out.static == made.static, (
        f"plan of another bucket: {made.static} into {out.static}"
    )
    for old, new in zip(out.buffers(), made.buffers(), strict=True):
        old.copy_(new)
    if out.rows is not None and made.rows is not None:
        for name in ("table", "lens_cpu", "live", "hidden"):
            if (new := getattr(made.rows, name)) is not None:
                getattr(out.rows, name).copy_(new)
    return out
