"""The attention of one tile of queries over a range of keys, by online softmax (FlashAttention-2).

A tile is up to M rows: some tokens of one req times the query heads that share a KV head, so that no key is read twice for them.
Scores are kept in base 2: `scale` has log2(e) in it. Keys lie in a pool, at slots that a page table names, or packed in rows.

Keys and queries come in two parts, k0 and k1, with one dot each, where their dims are no power of two (192 = 128 + 64), and where
they are two tensors (latents and rotated keys). With SHARED the values are k0 itself: it is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.attention_codes import numbers
from sglang_triton.numerics import dot, rounded, widen

NEG_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base, rows, row_stride: tl.constexpr, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of WIDTH elements, padded to BLOCK with zeros. rows: int[n], live: bool[n], looked at if MASKED -> [n, BLOCK]."""
    col = tl.arange(0, BLOCK)
    at = base + rows[:, None] * row_stride + col[None, :]
    if MASKED and WIDTH < BLOCK:
        x = tl.load(at, mask=live[:, None] & (col < WIDTH)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(at, mask=live[:, None], other=0.0)
    elif WIDTH < BLOCK:
        x = tl.load(at, mask=(col < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def capped(s, soft_cap):
    """soft_cap * tanh(s / soft_cap), by the exponential: absolute errors of some 1e-7 soft caps."""
    return soft_cap - 2 * soft_cap / (tl.exp2(s * (2 * LOG2_E / soft_cap)) + 1)


@triton.jit
def on_path(tree, step, own, tree_words, real):
    """Bits of a tree mask: does each row's token see each of its req's new tokens? step: int32[M], own: int32[N] -> bool[M, N].

    tree: that of the tile's first token.
    """
    inside = real[:, None] & ((own >= 0) & (own < tree_words * 32))[None, :]
    word = tl.load(tree + (step[:, None] * tree_words + (own // 32)[None, :]), mask=inside, other=0)
    return (own < 0)[None, :] | (((word >> (own % 32)[None, :]) & 1) == 1)


@triton.jit
def pages_of(table, first, stop, N: tl.constexpr, PAGE: tl.constexpr):
    """The pages of the keys [first, first + N): int32[N], or one where they lie in one. 0 from `stop` on."""
    if PAGE % N == 0:
        page = tl.load(table + first // PAGE, mask=first < stop, other=0)
    else:
        key = first + tl.arange(0, N)
        page = tl.load(table + key // PAGE, mask=key < stop, other=0)
    return page


@triton.jit
def visit(
    top,
    total,
    acc,
    q0,
    q1,
    start,
    stop,
    clip,
    end,
    row_first,
    row_last,
    real,
    step,
    prefix,
    k0,
    k1,
    v,
    k0_row: tl.constexpr,
    k1_row: tl.constexpr,
    v_row: tl.constexpr,
    k_scale,
    v_scale,
    scale_row,
    scale,
    scale1,
    soft_cap,
    table,
    key_base,
    tree,
    tree_words,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    W0: tl.constexpr,
    B0: tl.constexpr,
    W1: tl.constexpr,
    B1: tl.constexpr,
    WV: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TREE: tl.constexpr,
    SHARED: tl.constexpr,
    STATIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The keys [start, stop) in blocks of N, `start` a multiple of N -> top, total: float32[M], acc: float32[M, BV].

    Without MASKED every row sees all of them, and start and stop are a whole number of blocks apart.
    """
    if PAGE > 0:
        page = pages_of(table, start, stop, N, PAGE)
    for first in tl.range(start, stop, N):
        key = first + tl.arange(0, N)
        live = (key >= clip) & (key < end)
        # Where the slots of a block lie side by side, 32 bits reach from the first of them.
        base = tl.cast(0, tl.int64)
        slot = tl.arange(0, N)
        if PAGE == 0:
            base = key_base + first
        elif PAGE % N == 0:
            base = page.to(tl.int64) * PAGE + first % PAGE
        else:
            slot = page.to(tl.int64) * PAGE + key % PAGE
        if PAGE > 0:  # a block ahead: loads whose addresses come from loads would not overlap with the arithmetic
            page = pages_of(table, first + N, stop, N, PAGE)
        x0 = numbers(load_rows(k0 + base * k0_row, slot, k0_row, live, W0, B0, MASKED), DOT)
        s = dot(q0, tl.trans(x0), tl.zeros([q0.shape[0], N], tl.float32))
        if DYNAMIC:
            k_scales = tl.load(k_scale + (base + slot) * scale_row, mask=live, other=0)
        if W1 > 0:
            x1 = numbers(load_rows(k1 + base * k1_row, slot, k1_row, live, W1, B1, MASKED), DOT)
            if SHARED and DYNAMIC:  # the parts are two leaves, with scales of their own
                by = tl.load(v_scale + (base + slot) * scale_row, mask=live, other=0)
                s = s * k_scales[None, :]
                s += dot(q1, tl.trans(x1), tl.zeros([q0.shape[0], N], tl.float32)) * by[None, :]
            elif SHARED and STATIC:
                s += dot(q1, tl.trans(x1), tl.zeros([q0.shape[0], N], tl.float32)) * scale1
            else:
                s = dot(q1, tl.trans(x1), s)
        s = s * scale
        if DYNAMIC and not (SHARED and W1 > 0):
            s = s * k_scales[None, :]
        if SOFT_CAP:
            s = capped(s, soft_cap) * LOG2_E
        if MASKED:
            seen = (key[None, :] >= row_first[:, None]) & (key[None, :] < row_last[:, None])
            if TREE:
                seen = seen & on_path(tree, step, key - prefix, tree_words, real)
            s = tl.where(seen, s, NEG_INF)
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == NEG_INF, 0.0, new_top)  # a row that has seen no key yet
        p = tl.exp2(s - finite[:, None])
        decay = tl.exp2(top - finite)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        if SHARED:
            y = x0
            if DYNAMIC:
                p = p * k_scales[None, :]
        else:
            y = numbers(load_rows(v + base * v_row, slot, v_row, live, WV, BV, MASKED), DOT)
            if DYNAMIC:
                p = p * tl.load(v_scale + (base + slot) * scale_row, mask=live, other=0)[None, :]
        acc = dot(rounded(p, DOT), y, acc)
        top = new_top
    return top, total, acc


@triton.jit
def attend(
    token,
    count,
    position,
    begin,
    end,
    clip,
    prefix,
    part,
    head,
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
    key_base,
    tree,
    tree_words,
    first_key,
    M: tl.constexpr,
    N: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    """One tile: `count` tokens from row `token` of q on, the first of them at place `position` of its req, over keys [begin, end).

    head: which block of M of which KV head's rows, of which a tile has tokens * GROUP. Keys below `clip` are seen by none, and not
    read. part < 0: the result goes to o and lse; otherwise to part_o and part_lse from row `part` on, for `_merge_splits`.
    """
    kv_head = head // BLOCKS
    row = (head % BLOCKS) * M + tl.arange(0, M)
    step, q_head = row // GROUP, kv_head * GROUP + row % GROUP
    first_step = (head % BLOCKS) * M // GROUP
    real = step < count
    wide = token.to(tl.int64)
    x0 = numbers(load_rows(q0 + wide * q0_token, step * q0_token + q_head * q0_head, 1, real, W0, B0, True), DOT)
    if W1 > 0:
        x1 = numbers(load_rows(q1 + wide * q1_token, step * q1_token + q_head * q1_head, 1, real, W1, B1, True), DOT)
    else:
        x1 = x0

    row_last = tl.zeros([M], tl.int32) + end
    if CAUSAL:
        row_last = tl.minimum(position + step + 1, end)
    row_first = tl.zeros([M], tl.int32)
    if WINDOW > 0 and TREE:
        row_first = tl.load(first_key + token + step, mask=real, other=0)
    elif WINDOW > 0:
        row_first = tl.maximum(position + step - (WINDOW - 1), 0)

    top = tl.full([M], NEG_INF, tl.float32)
    total = tl.zeros([M], tl.float32)
    # A sink is like a key that was seen already and has no value; the first split alone counts it.
    if SINKS:  # noqa: SIM102  known to the compiler, and the next only to the device
        if begin <= clip:
            top = widen(tl.load(sinks + q_head, mask=real, other=0.0)) * LOG2_E
            total = tl.full([M], 1.0, tl.float32)
    acc = tl.zeros([M, BV], tl.float32)
    scale1 = scale  # of the second part's scores, in the first part's scale
    if STATIC:
        k_factor, v_factor = tl.load(k_scale + kv_head), tl.load(v_scale + kv_head)
        scale *= k_factor
        scale1 = v_factor / k_factor
    if TREE:
        tree += wide * tree_words
    if DYNAMIC:
        k_scale += kv_head
        v_scale += kv_head

    # Blocks that all rows see whole need no mask; those before and after them do.
    full_begin, full_end = begin, begin
    if PHASES:
        most = end
        if CAUSAL:
            most = tl.minimum(position + first_step + 1, end)
        if TREE:
            most = tl.minimum(most, prefix)
        if WINDOW > 0:
            full_begin = begin + tl.cdiv(tl.max(row_first) - begin, N) * N
            full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.maximum(begin + (most - begin) // N * N, full_begin)
        if WINDOW > 0:
            top, total, acc = visit(
                top, total, acc, x0, x1, begin, full_begin, clip, end, row_first, row_last, real, step, prefix,
                k0, k1, v, k0_row, k1_row, v_row, k_scale, v_scale, scale_row, scale, scale1, soft_cap,
                table, key_base, tree, tree_words,
                N, PAGE, W0, B0, W1, B1, WV, BV, DOT, SOFT_CAP, TREE, SHARED, STATIC, DYNAMIC, True,
            )  # fmt: skip
        top, total, acc = visit(
            top, total, acc, x0, x1, full_begin, full_end, clip, end, row_first, row_last, real, step, prefix,
            k0, k1, v, k0_row, k1_row, v_row, k_scale, v_scale, scale_row, scale, scale1, soft_cap,
            table, key_base, tree, tree_words,
            N, PAGE, W0, B0, W1, B1, WV, BV, DOT, SOFT_CAP, False, SHARED, STATIC, DYNAMIC, False,
        )  # fmt: skip
    top, total, acc = visit(
        top, total, acc, x0, x1, full_end, end, clip, end, row_first, row_last, real, step, prefix,
        k0, k1, v, k0_row, k1_row, v_row, k_scale, v_scale, scale_row, scale, scale1, soft_cap,
        table, key_base, tree, tree_words,
        N, PAGE, W0, B0, W1, B1, WV, BV, DOT, SOFT_CAP, TREE, SHARED, STATIC, DYNAMIC, True,
    )  # fmt: skip

    some = (total > 0) & (
        (row_last > row_first) | (part >= 0)
    )  # a sink alone is no key, but in the first of several splits
    total = tl.where(some, total, 1.0)
    factor = tl.where(some, 1.0 / total, 0.0)
    if STATIC:
        factor *= k_factor if SHARED else v_factor
    y = acc * factor[:, None]  # where a row has seen no key, acc is 0
    z = tl.where(some, (top + tl.log2(total)) * LN_2, NEG_INF)
    col = tl.arange(0, BV)
    stored = real[:, None] & (col < WV)[None, :]
    at = step * NUM_HEADS + q_head
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            skip = part.to(tl.int64) * NUM_HEADS
            tl.store(part_o + skip * WV + (at[:, None] * WV + col[None, :]), y, mask=stored)
            tl.store(part_lse + skip + at, z, mask=real)
    if part < 0:
        skip = wide * NUM_HEADS
        tl.store(o + skip * WV + (at[:, None] * WV + col[None, :]), rounded(y, o.dtype.element_ty), mask=stored)
        if LSE:
            tl.store(lse + skip + at, z, mask=real)
