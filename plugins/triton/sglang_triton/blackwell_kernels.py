"""Attention for Blackwell, in Gluon: scores, weights and results in tensor memory; a warp for copies by TMA, one that issues tcgen05, two groups of four for the softmax.

The schedule is FlashAttention-4's (https://github.com/Dao-AILab/flash-attention): each group has 128 rows, one a thread, and while it is at the softmax of a block, the
tensor cores are at the other group's products. Its weights lie where their scores were; what orders the next scores behind the product that reads them is that one
thread issues both. Results in tensor memory decay only when some row's largest score has grown by SLACK; until then weights are so much larger, and so is their sum.
What the rows, the blocks and the loader are is Hopper's (`hopper_kernels`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tensor_memory_descriptor,
)

from sglang_triton.hopper_kernels import (
    BEGIN,
    CHUNK,
    COUNT,
    END,
    GROUPS,
    LN_2,
    NEG_INF,
    PART,
    POSITION,
    REQ,
    TOKEN,
    clean_values,
    item_of,
    load_blocks,
    load_rows,
    masked,
    packed_tile,
    row_layout,
)

ROWS = gl.constexpr(128)  # of one group: one for each of tensor memory's lanes
SLACK = gl.constexpr(8.0)  # in base 2: weights are at most 256, which float16 holds, with as many digits as any other
WIDE = gl.constexpr(64)  # columns of results that are written at once: 128 bytes
DECAY = gl.constexpr(32)  # columns of results that are in registers at once, beside a block's scores

# Triton 3.9 renamed it.
reinterpret = getattr(tensor_memory_descriptor, "reinterpret", None) or tensor_memory_descriptor._reinterpret


@gluon.constexpr_function
def lane_layout(columns: int) -> gl.BlockedLayout:
    """ROWS by `columns`, as four warps read tensor memory: a row a thread."""
    return gl.BlockedLayout([1, columns], [32, 1], [4, 1], [0, 1])


@gluon.constexpr_function
def sum_layout(columns: int) -> TensorMemoryLayout:
    """ROWS by `columns` in tensor memory: of 32 bits, one a column; of 16, two."""
    return TensorMemoryLayout([128, columns], col_stride=1)


@gluon.jit
def weights_of(scores, group: gl.constexpr, dtype: gl.constexpr):
    """Where the weights of a group's rows lie: in the first half of their scores. What is taken as something else is all of the scores: Triton 3.8 takes no part of an allocation."""
    N: gl.constexpr = scores.shape[2]
    return reinterpret(scores, dtype, [GROUPS, ROWS, 2 * N], sum_layout(2 * N)).index(group).slice(0, N)


@gluon.jit
def issue_scores(q_smem, k_smem, scores, s_full, group: gl.constexpr, stage, CHUNKS: gl.constexpr):
    """Begins q k^T of one group's rows with the block in `stage`."""
    for c in gl.static_range(CHUNKS):
        keys = k_smem.index(stage * CHUNKS + c).permute((1, 0))
        tcgen05_mma(q_smem.index(group * CHUNKS + c), keys, scores.index(group), use_acc=c > 0)
    tcgen05_commit(s_full.index(group))


@gluon.jit
def issue_products(
    q_smem, k_smem, v_smem, scores, results, q_full, k_full, k_free, v_full, v_free, s_full, p_full, o_full,
    num_blocks, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The issuer. A group's scores are complete only once what was issued before them is, its results of the block before among it."""
    CHUNKS: gl.constexpr = W // CHUNK
    mbarrier.wait(k_full.index(0), 0)
    for g in gl.static_range(GROUPS):
        mbarrier.wait(q_full.index(g), 0)
        issue_scores(q_smem, k_smem, scores, s_full, g, 0, CHUNKS)
    tcgen05_commit(k_free.index(0))
    for i in range(num_blocks):
        stage, following = i % STAGES, (i + 1) % STAGES
        mbarrier.wait(v_full.index(stage), i // STAGES & 1)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(p_full.index(g), i & 1)
            weights = weights_of(scores, g, v_smem.dtype)
            tcgen05_mma(weights, v_smem.index(stage), results.index(g), use_acc=i > 0)
            if g == GROUPS - 1:
                tcgen05_commit(v_free.index(stage))
            if i + 1 < num_blocks:
                if g == 0:
                    mbarrier.wait(k_full.index(following), (i + 1) // STAGES & 1)
                issue_scores(q_smem, k_smem, scores, s_full, g, following, CHUNKS)
                if g == GROUPS - 1:
                    tcgen05_commit(k_free.index(following))
            else:
                tcgen05_commit(o_full.index(g))


@gluon.jit
def weigh(s, i, top, total, results, scale, WV: gl.constexpr):
    """One block's scores -> its weights, the new top, and what the total was before these weights. Where that is due, results of the blocks before i decay."""
    new_top = gl.max(s, 1) * scale
    due = new_top > top + SLACK
    if gl.max(due.to(gl.int32), 0) > 0:
        new_top = gl.where(due, new_top, top)  # a row's result is its own: where it is not due, it decays by nothing
        decay = gl.exp2(top - gl.where(new_top == NEG_INF, 0.0, new_top))
        if i > 0:
            wide: gl.constexpr = lane_layout(DECAY)
            factor = gl.convert_layout(decay, gl.SliceLayout(1, wide))[:, None]
            for c in gl.static_range(WV // DECAY):
                part = results.slice(c * DECAY, DECAY)
                part.store(part.load(wide) * factor)
        top, total = new_top, total * decay
    p = gl.exp2(s * scale - gl.where(top == NEG_INF, 0.0, top)[:, None])  # a row may have seen no key yet
    return p, top, total


@gluon.jit
def next_block(
    i, group: gl.constexpr, scores, results, s_full, p_full, top, total, scale, last_key, first_key,
    dtype: gl.constexpr, N: gl.constexpr, WV: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Weights of block i from its scores."""
    layout: gl.constexpr = lane_layout(N)
    mbarrier.wait(s_full.index(group), i & 1)
    s = scores.index(group).load(layout)
    if MASKED:
        s = masked(s, first_key, last_key, layout, N)
    p, top, total = weigh(s, i, top, total, results.index(group), scale, WV)
    weights_of(scores, group, dtype).store(p.to(dtype))
    mbarrier.arrive(p_full.index(group), count=1)
    return top, total + gl.sum(p, 1)


@gluon.jit
def attend_rows(
    group: gl.constexpr, q, q_token, q_head, q_smem, v_smem, scores, results, q_full, v_full, s_full, p_full, o_full,
    o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, some_unseen, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr,
    CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """ROWS rows over all blocks. Of the first `num_whole` blocks every row sees all keys."""
    rows: gl.constexpr = gl.SliceLayout(1, lane_layout(N))
    dtype: gl.constexpr = v_smem.dtype
    CHUNKS: gl.constexpr = W // CHUNK
    token = token.to(gl.int64)

    load_rows(q, q_token, q_head, q_smem, group, token, kv_head, count, GROUP, W)
    mbarrier.arrive(q_full.index(group), count=1)
    if group == 0:  # noqa: SIM102  known to the compiler, and the next only to the device
        if some_unseen:  # the issuer hears of it with this group's first weights, which are the first to meet values
            mbarrier.wait(v_full.index(0), 0)
            clean_values(v_smem.index(0), end - begin - (num_blocks - 1) * N)

    row = group * ROWS + gl.arange(0, ROWS, rows)
    last_key = gl.zeros_like(row) + end
    if CAUSAL:
        last_key = gl.minimum(position + row // GROUP + 1, end)
    top = gl.full([ROWS], NEG_INF, gl.float32, rows)
    total = gl.zeros([ROWS], gl.float32, rows)
    num_masked = gl.maximum(num_blocks - num_whole, 1)
    for i in range(num_masked):
        top, total = next_block(
            i, group, scores, results, s_full, p_full, top, total, scale, last_key, begin + (num_blocks - 1 - i) * N,
            dtype, N, WV, True,
        )  # fmt: skip
    for i in range(num_masked, num_blocks):
        top, total = next_block(
            i, group, scores, results, s_full, p_full, top, total, scale, last_key, 0, dtype, N, WV, False
        )

    some = total > 0
    factor = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    z = gl.where(some, (top + gl.log2(total)) * LN_2, NEG_INF)
    at = row // GROUP * NUM_HEADS + kv_head * GROUP + row % GROUP
    real = (row // GROUP < count) & (row < ROWS * GROUPS // GROUP * GROUP)
    mbarrier.wait(o_full.index(group), 0)
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            skip = part.to(gl.int64) * NUM_HEADS
            write_part(results.index(group), factor, part_o + skip * WV, at, real, WV)
            gl.store(part_lse + skip + at, z, mask=real)
    if part < 0:
        first = token * NUM_HEADS
        smem = q_smem.index(group * CHUNKS)  # queries that have met their last keys
        write_rows(results.index(group), factor, smem, group, o + first * WV, kv_head, count, NUM_HEADS, GROUP, WV)
        if LSE:
            gl.store(lse + first + at, z, mask=real)


@gluon.jit
def write_part(results, factor, part_o, at, real, WV: gl.constexpr):
    """results * factor to rows `at` of float32[_, WV]."""
    wide: gl.constexpr = lane_layout(DECAY)
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    at, real = gl.convert_layout(at, rows)[:, None] * WV, gl.convert_layout(real, rows)[:, None]
    column = gl.arange(0, DECAY, gl.SliceLayout(0, wide))
    for c in gl.static_range(WV // DECAY):
        y = results.slice(c * DECAY, DECAY).load(wide) * gl.convert_layout(factor, rows)[:, None]
        gl.store(part_o + (at + (c * DECAY + column)[None, :]), y, mask=real)


@gluon.jit
def write_rows(
    results, factor, smem, group: gl.constexpr, o, kv_head, count, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, WV: gl.constexpr
):  # fmt: skip
    """results * factor to o. By way of shared memory, WIDE columns at a time: a row a thread is no way to write to memory."""
    wide: gl.constexpr = lane_layout(WIDE)
    layout: gl.constexpr = row_layout(WIDE)
    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    real = (row // GROUP < count) & (row < ROWS * GROUPS // GROUP * GROUP)
    at = (row // GROUP * NUM_HEADS + kv_head * GROUP + row % GROUP) * WV
    column = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    factor = gl.convert_layout(factor, gl.SliceLayout(1, wide))[:, None]
    for c in gl.static_range(WV // WIDE):
        smem.store((results.slice(c * WIDE, WIDE).load(wide) * factor).to(smem.dtype))
        gl.store(o + (at[:, None] + (c * WIDE + column)[None, :]), smem.load(layout), mask=real[:, None])


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
    some_unseen = end < begin + num_blocks * N

    q_smem = gl.allocate_shared_memory(dtype, [GROUPS * CHUNKS, ROWS, CHUNK], k_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, N, CHUNK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, N, WV], v_desc.layout)
    scores = allocate_tensor_memory(gl.float32, [GROUPS, ROWS, N], sum_layout(N))
    results = allocate_tensor_memory(gl.float32, [GROUPS, ROWS, WV], sum_layout(WV))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    s_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(s_full.index(i), count=1)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(o_full.index(i), count=1)
    fence_async_shared()
    # Constexprs pass into partitions only as they stand in the call.
    gl.warp_specialize(
        [
            (attend_rows, (
                0, q, q_token, q_head, q_smem, v_smem, scores, results, q_full, v_full, s_full, p_full, o_full,
                o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, some_unseen, scale,
                NUM_HEADS, GROUP, W, WV, N, CAUSAL, SPLIT, LSE,
            )),
            (attend_rows, (
                1, q, q_token, q_head, q_smem, v_smem, scores, results, q_full, v_full, s_full, p_full, o_full,
                o, lse, part_o, part_lse, token, kv_head, count, position, begin, end, part, num_blocks, num_whole, some_unseen, scale,
                NUM_HEADS, GROUP, W, WV, N, CAUSAL, SPLIT, LSE,
            )),
            (issue_products, (
                q_smem, k_smem, v_smem, scores, results, q_full, k_full, k_free, v_full, v_free, s_full, p_full, o_full,
                num_blocks, W, STAGES,
            )),
            (load_blocks, (
                k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, key_base, table,
                kv_head * k_head, kv_head * v_head, begin, end, num_blocks, W, WV, N, PAGE, STAGES,
            )),
        ],
        [4, 1, 1],
        [224, 40, 40],
    )  # fmt: skip


@gluon.jit
def _attend_packed_blackwell(
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
def _attend_items_blackwell(
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
