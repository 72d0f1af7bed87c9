"""`StepInput`: a plan's host integers laid out as arrays, all of it vectorised: no loop over reqs or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_core.backend.interface import Bucket
from sglang_core.runner.slot_table import Int32, SlotTable
from sglang_core.types import PoolGroup, StepPlan

UNKNOWN_TOKEN = -1  # the id is still on the device


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """T tokens packed over R reqs, padded to the bucket where there is one.

    Padding tokens come last, belong to no req, sit at position 0 and write to slot 0 of page 0; padding reqs have length 0.
    """

    num_tokens: int  # T, padding included
    num_reqs: int  # R, padding included
    max_extend: int  # Q
    num_pages: int  # C
    padded: bool  # to a bucket; else it has its own shape
    slots: Int32  # [R]
    prefix_lens: Int32  # [R]
    seq_lens: Int32  # [R]
    cu_extend: Int32  # [R + 1]
    token_ids: Int32  # [T]
    token_slots: Int32 | None  # [T]
    positions: Int32  # [T]
    slot_mapping: dict[PoolGroup, Int32]  # [T]
    page_table: dict[PoolGroup, Int32]  # [R, C]
    encoder_lens: Int32  # [R] tokens of an encoder's output, 0 for none
    encoder_table: Int32  # [R, C of encoder outputs]
    state_reads: Int32  # [R] slots of the state pool, 0 where the model has none
    state_writes: Int32  # [R]
    sample_rows: Int32 | None  # [R] the last token of each req; None where token r is req r's, as in decoding
    token_adapter: Int32  # [T] slot of each token's adapter, -1 for none
    num_real_reqs: int


def build_step_input(
    plan: StepPlan, table: SlotTable, page_size: int, buckets: Sequence[Bucket], *, exact_too: bool = False
) -> StepInput:
    """Lay out `plan` against the slot table, in its own shape where there are no buckets, or none holds it and `exact_too`.

    Raises LookupError where it must be padded and no bucket holds it.
    """
    slots = np.asarray(plan.slots, np.int32)
    prefix_lens = np.asarray(plan.prefix_lens, np.int32)
    extend_lens = np.asarray(plan.extend_lens, np.int32)
    token_ids = np.asarray(plan.token_ids, np.int32)
    num_real_reqs, num_real_tokens = len(slots), len(token_ids)
    seq_lens = prefix_lens + extend_lens
    num_pages = int(-(-int(seq_lens.max()) // page_size))
    max_extend = int(extend_lens.max())

    num_tokens, num_reqs = num_real_tokens, num_real_reqs
    bucket = pick_bucket(buckets, num_tokens, num_reqs, max_extend, num_pages)
    if bucket is None and buckets and not exact_too:
        raise LookupError(
            f"no bucket holds a step of {num_tokens} tokens, {num_reqs} reqs, longest extend {max_extend}, {num_pages} pages"
        )
    if bucket is not None:
        num_tokens, num_reqs = bucket.num_tokens, bucket.num_reqs
        max_extend, num_pages = bucket.max_extend, bucket.num_pages
        slots = _pad(slots, num_reqs, table.padding_slot)
        prefix_lens, extend_lens = _pad(prefix_lens, num_reqs, 0), _pad(extend_lens, num_reqs, 0)
        seq_lens = _pad(seq_lens, num_reqs, 0)
        token_ids = _pad(token_ids, num_tokens, 0)

    cu_extend = np.zeros(num_reqs + 1, np.int32)
    np.cumsum(extend_lens, out=cu_extend[1:])
    req_of_token = np.repeat(np.arange(num_reqs, dtype=np.int32), extend_lens)
    positions = np.arange(num_real_tokens, dtype=np.int32) + (prefix_lens - cu_extend[:-1])[req_of_token]
    slot_of_token = slots[req_of_token]
    page_column, offset = positions // page_size, positions % page_size
    slot_mapping = {
        group: _pad(pages[slot_of_token, page_column] * np.int32(page_size) + offset, num_tokens, 0)
        for group, pages in table.page_table.items()
    }
    unknown = token_ids == UNKNOWN_TOKEN
    token_slots = None
    if bucket is not None or unknown.any():
        token_slots = np.where(unknown, _pad(slot_of_token, num_tokens, table.padding_slot), -1).astype(np.int32)
    return StepInput(
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        max_extend=max_extend,
        num_pages=num_pages,
        padded=bucket is not None,
        slots=slots,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        cu_extend=cu_extend,
        token_ids=np.where(unknown, 0, token_ids).astype(np.int32),
        token_slots=token_slots,
        positions=_pad(positions, num_tokens, 0),
        slot_mapping=slot_mapping,
        page_table={group: pages[slots, :num_pages] for group, pages in table.page_table.items()},
        encoder_lens=table.encoder_len[slots],
        encoder_table=table.encoder_table[slots],
        state_reads=_pad(np.asarray(plan.state_reads, np.int32), num_reqs, 0),
        state_writes=_pad(np.asarray(plan.state_writes, np.int32), num_reqs, 0),
        sample_rows=None
        if num_tokens == num_reqs and max_extend == 1
        else np.maximum(cu_extend[1:] - 1, 0).astype(np.int32),
        token_adapter=_pad(table.adapter[slot_of_token], num_tokens, -1),
        num_real_reqs=num_real_reqs,
    )


def padding_input(bucket: Bucket, table: SlotTable) -> StepInput:
    """A step of this bucket with no req in it."""
    reqs, tokens = np.zeros(bucket.num_reqs, np.int32), np.zeros(bucket.num_tokens, np.int32)
    slots = np.full(bucket.num_reqs, table.padding_slot, np.int32)
    return StepInput(
        num_tokens=bucket.num_tokens,
        num_reqs=bucket.num_reqs,
        max_extend=bucket.max_extend,
        num_pages=bucket.num_pages,
        padded=True,
        slots=slots,
        prefix_lens=reqs,
        seq_lens=reqs,
        cu_extend=np.zeros(bucket.num_reqs + 1, np.int32),
        token_ids=tokens,
        token_slots=np.full(bucket.num_tokens, -1, np.int32),
        positions=tokens,
        slot_mapping=dict.fromkeys(table.page_table, tokens),
        page_table={group: pages[slots, : bucket.num_pages] for group, pages in table.page_table.items()},
        encoder_lens=reqs,
        encoder_table=table.encoder_table[slots],
        state_reads=reqs,
        state_writes=reqs,
        sample_rows=None if bucket.num_tokens == bucket.num_reqs and bucket.max_extend == 1 else reqs,
        token_adapter=np.full(bucket.num_tokens, -1, np.int32),
        num_real_reqs=0,
    )


def pick_bucket(
    buckets: Sequence[Bucket], num_tokens: int, num_reqs: int, max_extend: int, num_pages: int
) -> Bucket | None:
    """The cheapest bucket that holds the step, by tokens, then reqs, then columns; None where none does."""
    fits = [
        b
        for b in buckets
        if b.num_tokens >= num_tokens
        and b.num_reqs >= num_reqs
        and b.max_extend >= max_extend
        and b.num_pages >= num_pages
    ]
    return min(fits, key=lambda b: (b.num_tokens, b.num_reqs, b.num_pages, b.max_extend), default=None)


def _pad(x: Int32, size: int, value: int) -> Int32:
    if len(x) == size:
        return x.astype(np.int32, copy=False)
    out = np.full(size, value, np.int32)
    out[: len(x)] = x
    return out
