"""Attention for Hopper, in Gluon: keys and values by TMA, products by wgmma, a warp for copies and two groups of four for arithmetic.

The schedule is FlashAttention-3's (Shah et al. 2024): while the tensor cores multiply the weights of one block of keys with its values, the group
that waits for them works at the softmax of the next block. Two groups of 64 rows each share the blocks that a third, the loader, brings ahead.
Rows are some tokens of one req times the query heads that share a KV head. Blocks come last one first: those that need a mask are over first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NEG_INF = gl.constexpr(float("-inf"))
LN_2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one group of four warps: what wgmma multiplies
GROUPS = gl.constexpr(2)
CHUNK = gl.constexpr(64)  # dims of keys that are copied and multiplied at once: 128 bytes, the widest swizzle
# Fields of a record in the work list, see attention_plan.
FIELDS = gl.constexpr(8)
TOKEN, COUNT, REQ, POSITION, BEGIN, END, PART = (gl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 7))

# Triton 3.9 renamed it.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(columns: int, bits: int = 16) -> gl.NVMMADistributedLayout:
    """ROWS by `columns` of float32, as wgmma leaves them with a group of four warps; `bits`: of what it multiplies."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // bits])


@gluon.constexpr_function
def row_layout(columns: int) -> gl.BlockedLayout:
    """Rows of `columns` 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def rows_of(key_base, table, first, end, N: gl.constexpr, PAGE: gl.constexpr):
    """Where the keys [first, first + N) lie: the rows that boxes of them begin at. Beyond `end` any will do."""
    rows = ()
    if PAGE == 0:
        rows = (key_base + first,)
    else:
        BOX: gl.constexpr = PAGE if PAGE < N else N
        for j in gl.static_range(N // BOX):
            key = first + j * BOX
            row = gl.load(table + key // PAGE, mask=key < end, other=0) * PAGE + key % PAGE
            rows = rows + (row,)
    return rows


@gluon.jit
def load_block(desc, smem, at, full, rows, column, W: gl.constexpr, N: gl.constexpr):
    """N keys from these rows on, or their values, to smem[at], smem[at + 1], ...: as many dims at once as one of these has."""
    BOX: gl.constexpr = N // len(rows)
    mbarrier.expect(full, N * W * 2)
    for j in gl.static_range(N // BOX):
        for c in gl.static_range(W // smem.shape[2]):
            part = smem.index(at + c).slice(j * BOX, BOX)
            async_load(desc, [rows[j], column + c * smem.shape[2]], full, part)


@gluon.jit
def load_blocks(
    k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, key_base, table, k_col, v_col, begin, end, num_blocks,
    W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loader: blocks of keys and of values, the last one first."""
    CHUNKS: gl.constexpr = W // CHUNK
    for i in range(num_blocks):
        stage, phase = i % STAGES, i // STAGES & 1
        rows = rows_of(key_base, table, begin + (num_blocks - 1 - i) * N, end, N, PAGE)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        load_block(k_desc, k_smem, stage * CHUNKS, k_full.index(stage), rows, k_col, W, N)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        load_block(v_desc, v_smem, stage, v_full.index(stage), rows, v_col, WV, N)


@gluon.jit
def load_rows(
    q, q_token, q_head, q_smem, group: gl.constexpr, token, kv_head, count, GROUP: gl.constexpr, W: gl.constexpr
):
    """A group's rows of queries, some CHUNK of columns after the other: as many rows as q_smem has. Those of no token are zero. token: int64."""
    layout: gl.constexpr = row_layout(CHUNK)
    ROWS: gl.constexpr = q_smem.shape[1]
    CHUNKS: gl.constexpr = W // CHUNK
    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    at = row // GROUP * q_token + (kv_head * GROUP + row % GROUP) * q_head
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    for c in gl.static_range(CHUNKS):
        where = q + token * q_token + (at[:, None] + (c * CHUNK + column)[None, :])
        x = gl.load(where, mask=(row // GROUP < count)[:, None], other=0.0)
        q_smem.index(group * CHUNKS + c).store(x)
    fence_async_shared()


@gluon.jit
def clean_values(v_smem, num_seen):
    """Values of keys that nobody sees are weighted by zero, and may be NaN. They lie in the last block alone."""
    layout: gl.constexpr = row_layout(v_smem.shape[1])
    seen = gl.arange(0, v_smem.shape[0], gl.SliceLayout(1, layout)) < num_seen
    v_smem.store(gl.where(seen[:, None], v_smem.load(layout), 0.0).to(v_smem.dtype))
    fence_async_shared()


@gluon.jit
def scores(q_smem, k_smem, group: gl.constexpr, stage, layout: gl.constexpr, N: gl.constexpr, CHUNKS: gl.constexpr):
    """Begins q k^T of one group's rows with the block in `stage`: what to wait for."""
    s = gl.zeros([ROWS, N], gl.float32, layout)
    for c in gl.static_range(CHUNKS):
        keys = k_smem.index(stage * CHUNKS + c).permute((1, 0))
        s = warpgroup_mma(q_smem.index(group * CHUNKS + c), keys, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def softmax(s, top, total, scale, dtype: gl.constexpr, operand: gl.constexpr):
    """One block's scores -> weights as an operand, the new top and total, and by how much what was summed before decays."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    finite = gl.where(new_top == NEG_INF, 0.0, new_top)  # a row that has seen no key yet
    p = gl.exp2(s * scale - finite[:, None])
    decay = gl.exp2(top - finite)
    total = total * decay + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), operand), new_top, total, decay


@gluon.jit
def masked(s, first_key, last_key, layout: gl.constexpr, N: gl.constexpr):
    """Scores of the keys first_key + [0, N), of which a row sees those before its last_key."""
    key = first_key + gl.arange(0, N, gl.SliceLayout(0, layout))
    return gl.where(key[None, :] < last_key[:, None], s, NEG_INF)


@gluon.jit
def next_block(
    i, s_layout: gl.constexpr, o_layout: gl.constexpr, group: gl.constexpr, q_smem, k_smem, v_smem, k_full, k_free, v_full,
    v_free, p, acc, top, total, scale, last_key, first_key,
    W: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of block i while the weights of the one before meet its values; then the softmax of i, while they still do."""
    dtype: gl.constexpr = v_smem.dtype
    stage, before = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), i // STAGES & 1)
    s = scores(q_smem, k_smem, group, stage, s_layout, N, W // CHUNK)
    mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(stage), count=1)
    if MASKED:
        s = masked(s, first_key, last_key, s_layout, N)
    new_p, top, total, decay = softmax(s, top, total, scale, dtype, gl.DotOperandLayout(0, o_layout, 2))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    return new_p, acc, top, total


@gluon.jit
def attend_rows(
    group: gl.constexpr, q, q_token, q_head, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free, v_clean,
    o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """ROWS rows over all blocks. Of the first `num_whole` blocks every row sees all keys."""
    s_layout: gl.constexpr = product_layout(N)
    o_layout: gl.constexpr = product_layout(WV)
    dtype: gl.constexpr = v_smem.dtype
    CHUNKS: gl.constexpr = W // CHUNK
    token = token.to(gl.int64)

    load_rows(q, q_token, q_head, q_smem, group, token, kv_head, count, GROUP, W)
    if end < begin + num_blocks * N:
        mbarrier.wait(v_full.index(0), 0)
        if group == 0:
            clean_values(v_smem.index(0), end - begin - (num_blocks - 1) * N)
            mbarrier.arrive(v_clean, count=1)
        mbarrier.wait(v_clean, 0)

    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    last_key = gl.zeros_like(row) + end
    if CAUSAL:
        last_key = gl.minimum(position + row // GROUP + 1, end)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[scores(q_smem, k_smem, group, 0, s_layout, N, CHUNKS)])
    mbarrier.arrive(k_free.index(0), count=1)
    s = masked(s, begin + (num_blocks - 1) * N, last_key, s_layout, N)
    top = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, WV], gl.float32, o_layout)
    p, top, total, decay = softmax(s, top, total, scale, dtype, gl.DotOperandLayout(0, o_layout, 2))
    for i in range(1, num_blocks - num_whole):
        p, acc, top, total = next_block(
            i, s_layout, o_layout, group, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free,
            p, acc, top, total, scale, last_key, begin + (num_blocks - 1 - i) * N, W, N, STAGES, True,
        )  # fmt: skip
    for i in range(gl.maximum(1, num_blocks - num_whole), num_blocks):
        p, acc, top, total = next_block(
            i, s_layout, o_layout, group, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free,
            p, acc, top, total, scale, last_key, 0, W, N, STAGES, False,
        )  # fmt: skip
    final = num_blocks - 1
    mbarrier.wait(v_full.index(final % STAGES), final // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(final % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    some = total > 0
    factor = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    y = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
    z = gl.where(some, (top + gl.log2(total)) * LN_2, NEG_INF)
    sum_at = row // GROUP * NUM_HEADS + kv_head * GROUP + row % GROUP
    real = (row // GROUP < count) & (row < ROWS * GROUPS // GROUP * GROUP)
    o_row = gl.convert_layout(sum_at, gl.SliceLayout(1, o_layout))
    o_real = gl.convert_layout(real, gl.SliceLayout(1, o_layout))
    o_at = o_row[:, None] * WV + gl.arange(0, WV, gl.SliceLayout(0, o_layout))[None, :]
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            skip = part.to(gl.int64) * NUM_HEADS
            gl.store(part_o + skip * WV + o_at, y, mask=o_real[:, None])
            gl.store(part_lse + skip + sum_at, z, mask=real)
    if part < 0:
        gl.store(o + token * (NUM_HEADS * WV) + o_at, y.to(dtype), mask=o_real[:, None])
        if LSE:
            gl.store(lse + token * NUM_HEADS + sum_at, z, mask=real)


@gluon.jit
def attend_tile(
    q, q_token, q_head, k_desc, v_desc, k_head, v_head, key_base, table, o, lse, part_o, part_lse,
    token, kv_head, count, position, begin, end, part, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """`count` tokens from row `token` of q on, the first of them at place `position` of its req, over keys [begin, end), begin a multiple of N.

    Without tokens nothing is written, and a block of anything is read.
    """
    CHUNKS: gl.constexpr = W // CHUNK
    dtype: gl.constexpr = k_desc.dtype
    num_blocks = gl.maximum(gl.cdiv(end - begin, N), 1)
    whole = end
    if CAUSAL:
        whole = gl.minimum(position + 1, end)
    num_whole = gl.maximum(whole - begin, 0) // N

    q_smem = gl.allocate_shared_memory(dtype, [GROUPS * CHUNKS, ROWS, CHUNK], k_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, N, CHUNK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, N, WV], v_desc.layout)
    v_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(v_clean, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    # Constexprs pass into partitions only as they stand in the call.
    gl.warp_specialize(
        [
            (attend_rows, (
                0, q, q_token, q_head, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free, v_clean,
                o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, scale,
                NUM_HEADS, GROUP, W, WV, N, STAGES, CAUSAL, SPLIT, LSE,
            )),
            (attend_rows, (
                1, q, q_token, q_head, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free, v_clean,
                o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, scale,
                NUM_HEADS, GROUP, W, WV, N, STAGES, CAUSAL, SPLIT, LSE,
            )),
            (load_blocks, (
                k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, key_base, table,
                kv_head * k_head, kv_head * v_head, begin, end, num_blocks, W, WV, N, PAGE, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def packed_tile(cu_q, cu_k, num_reqs, num_tiles, L: gl.constexpr, CAUSAL: gl.constexpr):
    """What a program does of packed rows: first token, KV head, how many tokens, place of the first in its req; first key, and how many of them."""
    unit = gl.program_id(0)
    head, unit = unit // (num_tiles * num_reqs), unit % (num_tiles * num_reqs)
    tile, req = num_tiles - 1 - unit // num_reqs, unit % num_reqs
    first, last = gl.load(cu_q + req), gl.load(cu_q + req + 1)
    key_base = gl.load(cu_k + req)
    num_keys = gl.load(cu_k + req + 1) - key_base
    count = gl.maximum(gl.minimum(last - first - tile * L, L), 0)
    position = tile * L + num_keys - (last - first)
    end = num_keys
    if CAUSAL:
        end = gl.maximum(gl.minimum(position + count, num_keys), 0)
    if count == 0:
        end = 0
    return first + tile * L, head, count, position, key_base, end


@gluon.jit
def _attend_packed_hopper(
    q, q_token, q_head, k_desc, v_desc, k_head, v_head, cu_q, cu_k, o, lse, scale, num_reqs, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """attn.ragged: a program for each tile that a req of the longest length has, last tile first, as it has most keys if causal."""
    L: gl.constexpr = GROUPS * ROWS // GROUP
    token, head, count, position, key_base, end = packed_tile(cu_q, cu_k, num_reqs, num_tiles, L, CAUSAL)
    attend_tile(
        q, q_token, q_head, k_desc, v_desc, k_head, v_head, key_base, None, o, lse, None, None,
        token, head, count, position, 0, end, -1, scale,
        NUM_HEADS, GROUP, W, WV, N, 0, STAGES, CAUSAL, False, LSE,
    )  # fmt: skip


@gluon.jit
def item_of(work, counter, items, NUM_KV_HEADS: gl.constexpr):
    """A program's record in the work list, its KV head, and 0 where there are fewer items: it then has no token and no key."""
    num_items = gl.load(work + counter)
    unit = gl.program_id(0)
    item, head = unit % gl.maximum(num_items, 1), unit // gl.maximum(num_items, 1)
    live = (unit < num_items * NUM_KV_HEADS).to(gl.int32)
    return work + (items + item) * FIELDS, head * live, live


@gluon.jit
def _attend_items_hopper(
    q, q_token, q_head, k_desc, v_desc, k_head, v_head, table, num_pages, o, lse, part_o, part_lse, scale, work, counter, items,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """attn.paged over the long tier of a work list: a program for each item that there is room for and each KV head, head by head.

    work[counter] is how many items there are; they stand from record `items` on.
    """
    record, head, live = item_of(work, counter, items, NUM_KV_HEADS)
    req = gl.load(record + REQ)
    attend_tile(
        q, q_token, q_head, k_desc, v_desc, k_head, v_head, 0, table + req.to(gl.int64) * num_pages, o, lse, part_o, part_lse,
        gl.load(record + TOKEN), head, gl.load(record + COUNT) * live, gl.load(record + POSITION), gl.load(record + BEGIN),
        gl.load(record + END) * live, gl.load(record + PART), scale,
        NUM_HEADS, NUM_HEADS // NUM_KV_HEADS, W, WV, N, PAGE, STAGES, CAUSAL, SPLIT, LSE,
    )  # fmt: skip
