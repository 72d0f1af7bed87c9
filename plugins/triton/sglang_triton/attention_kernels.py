"""The kernels of attention: a step's work list over a pool, packed rows, and the merging of results.

Names of what is launched begin with an underscore.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.attention_tile import LN_2, LOG2_E, NEG_INF, attend
from sglang_triton.numerics import rounded, widen
from sglang_triton.turns import take_turn

# Fields of a record in the work list, see attention_plan.
FIELDS = tl.constexpr(8)
TOKEN, COUNT, REQ, POSITION, BEGIN, END, CLIP, PART = (tl.constexpr(i) for i in range(8))


@triton.jit
def _attend_items(
    q0,
    q1,
    q0_token,
    q0_head,
    q1_token,
    q1_head,
    k0,
    k1,
    v,
    k0_row: tl.constexpr,
    k1_row: tl.constexpr,
    v_row: tl.constexpr,
    k_head,
    v_head,
    k_scale,
    v_scale,
    scale_row,
    o,
    lse,
    part_o,
    part_lse,
    scale,
    soft_cap,
    sinks,
    table,
    num_pages,
    tree,
    tree_words,
    first_key,
    prefix_lens,
    work,
    counter,
    items,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W0: tl.constexpr,
    B0: tl.constexpr,
    W1: tl.constexpr,
    B1: tl.constexpr,
    WV: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    TREE: tl.constexpr,
    SHARED: tl.constexpr,
    STATIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PHASES: tl.constexpr,
    SPLIT: tl.constexpr,
    LSE: tl.constexpr,
):
    """attn.paged over one tier of a work list: as many programs as fit on the device, which share its items and heads.

    work[counter] is how many items there are; they stand from record `items` on. Short tiers go item by item, so that neighbouring
    programs read neighbouring heads of the same slots; long ones head by head, so that the keys of one are read from the cache.
    """
    take_turn()
    num_items = tl.load(work + counter)
    BLOCKS: tl.constexpr = (TOKENS * GROUP + M - 1) // M
    heads: tl.constexpr = NUM_KV_HEADS * BLOCKS
    # What does not change from unit to unit is cheap, and would fill registers: it is not to be moved out of the loop.
    for unit in tl.range(tl.program_id(0), num_items * heads, tl.num_programs(0), disable_licm=True):
        if PHASES:
            item, head = unit % num_items, unit // num_items
        else:
            item, head = unit // heads, unit % heads
        record = work + (items + item) * FIELDS
        req = tl.load(record + REQ)
        prefix = 0
        if TREE:
            prefix = tl.load(prefix_lens + req)
        kv_head = tl.cast(head // BLOCKS, tl.int64)  # of a loop: an int where it is interpreted
        attend(
            tl.load(record + TOKEN), tl.load(record + COUNT), tl.load(record + POSITION), tl.load(record + BEGIN),
            tl.load(record + END), tl.load(record + CLIP), prefix, tl.load(record + PART), head,
            q0, q1, q0_token, q0_head, q1_token, q1_head,
            k0 + kv_head * k_head, k1 + kv_head * k_head, v + kv_head * v_head, k0_row, k1_row, v_row,
            k_scale, v_scale, scale_row, o, lse, part_o, part_lse, scale, soft_cap, sinks,
            table + req.to(tl.int64) * num_pages, 0, tree, tree_words, first_key,
            M, N, PAGE, NUM_HEADS, GROUP, BLOCKS, W0, B0, W1, B1, WV, BV, DOT,
            CAUSAL, WINDOW, SOFT_CAP, SINKS, TREE, SHARED, STATIC, DYNAMIC, PHASES, SPLIT, LSE,
        )  # fmt: skip


@triton.jit
def _attend_packed(
    q0,
    q1,
    q_token,
    q_head,
    k0,
    k1,
    v,
    k_row: tl.constexpr,
    v_row: tl.constexpr,
    k_head,
    v_head,
    cu_q,
    cu_k,
    o,
    lse,
    scale,
    soft_cap,
    num_reqs,
    num_tiles,
    M: tl.constexpr,
    N: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    W0: tl.constexpr,
    B0: tl.constexpr,
    W1: tl.constexpr,
    B1: tl.constexpr,
    WV: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    LSE: tl.constexpr,
):
    """attn.ragged: a program for each tile that a req of the longest length has, last tile first, as it has most keys if causal."""
    take_turn()
    L: tl.constexpr = M // GROUP if GROUP < M else 1
    BLOCKS: tl.constexpr = (L * GROUP + M - 1) // M
    unit = tl.program_id(0)
    head, unit = unit // (num_tiles * num_reqs), unit % (num_tiles * num_reqs)
    tile, req = num_tiles - 1 - unit // num_reqs, unit % num_reqs
    first, last = tl.load(cu_q + req), tl.load(cu_q + req + 1)
    if tile * L < last - first:
        key_base = tl.load(cu_k + req)
        num_keys = tl.load(cu_k + req + 1) - key_base
        count = tl.minimum(last - first - tile * L, L)
        position = tile * L + num_keys - (last - first)
        end, clip = num_keys, 0
        if CAUSAL:
            end = tl.maximum(tl.minimum(position + count, num_keys), 0)
        if WINDOW > 0:
            clip = tl.maximum(position - (WINDOW - 1), 0)
        kv_head = tl.cast(head // BLOCKS, tl.int64)  # of a loop: an int where it is interpreted
        attend(
            first + tile * L, count, position, clip // N * N, end, clip, 0, -1, head,
            q0, q1, q_token, q_head, q_token, q_head,
            k0 + kv_head * k_head, k1 + kv_head * k_head, v + kv_head * v_head, k_row, k_row, v_row,
            None, None, 0, o, lse, None, None, scale, soft_cap, None,
            None, key_base.to(tl.int64), None, 0, None,
            M, N, 0, NUM_HEADS, GROUP, BLOCKS, W0, B0, W1, B1, WV, BV, DOT,
            CAUSAL, WINDOW, SOFT_CAP, False, False, False, False, False, True, False, LSE,
        )  # fmt: skip


@triton.jit
def _merge_splits(
    part_o,
    part_lse,
    o,
    lse,
    work,
    counter,
    merges,
    NUM_HEADS: tl.constexpr,
    WV: tl.constexpr,
    BV: tl.constexpr,
    SPLITS: tl.constexpr,
    LSE: tl.constexpr,
):
    """The results of a token's splits become one, a head at a time, SPLITS of them at once, always in the same order."""
    take_turn()
    count = tl.load(work + counter)
    col = tl.arange(0, BV)
    for unit in range(tl.program_id(0), count * NUM_HEADS, tl.num_programs(0)):
        record, head = work + (merges + unit // NUM_HEADS) * FIELDS, unit % NUM_HEADS
        token, splits, part, stride = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
        top = tl.full([], NEG_INF, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BV], tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            row = (part.to(tl.int64) + split * stride) * NUM_HEADS + head
            s = tl.load(part_lse + row, mask=split < splits, other=NEG_INF)
            live = s > NEG_INF
            x = tl.load(part_o + row[:, None] * WV + col[None, :], mask=live[:, None] & (col < WV)[None, :], other=0)
            new_top = tl.maximum(top, tl.max(s, 0))
            finite = tl.where(new_top == NEG_INF, 0.0, new_top)
            w, decay = tl.exp2((s - finite) * LOG2_E), tl.exp2((top - finite) * LOG2_E)
            total = total * decay + tl.sum(w, 0)
            acc = acc * decay + tl.sum(x * w[:, None], 0)
            top = new_top
        at = token.to(tl.int64) * NUM_HEADS + head
        y = acc / tl.where(total > 0, total, 1.0)
        tl.store(o + at * WV + col, rounded(y, o.dtype.element_ty), mask=col < WV)
        if LSE:
            tl.store(lse + at, top + tl.log2(total) * LN_2)


@triton.jit
def _merge_halves(
    o_a,
    lse_a,
    o_b,
    lse_b,
    o,
    lse,
    num_rows,
    num_heads,
    a_token,
    a_head,
    b_token,
    b_head,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
):
    """attn.merge. A row is a token's head."""
    take_turn()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, B)
    real = row < num_rows
    s_a, s_b = tl.load(lse_a + row, mask=real, other=0), tl.load(lse_b + row, mask=real, other=0)
    top = tl.maximum(s_a, s_b)
    top = tl.where(top == NEG_INF, 0.0, top)
    w_a, w_b = tl.exp2((s_a - top) * LOG2_E), tl.exp2((s_b - top) * LOG2_E)
    total = w_a + w_b
    token, head = row // num_heads, row % num_heads
    inside = (col < W)[None, :]
    # An empty side's values may be NaN: not read.
    a = tl.load(
        o_a + (token * a_token + head * a_head)[:, None] + col[None, :],
        mask=(real & (w_a > 0))[:, None] & inside,
        other=0,
    )
    b = tl.load(
        o_b + (token * b_token + head * b_head)[:, None] + col[None, :],
        mask=(real & (w_b > 0))[:, None] & inside,
        other=0,
    )
    y = (widen(a) * w_a[:, None] + widen(b) * w_b[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o + row[:, None] * W + col[None, :], rounded(y, o.dtype.element_ty), mask=real[:, None] & inside)
    tl.store(lse + row, top + tl.log2(total) * LN_2, mask=real)
