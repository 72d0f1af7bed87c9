"""Attention over latents for Hopper, in Gluon: 64 query heads or more over one latent a key, read once into shared memory as key and as value.

Three groups of four warps and a loader. One group multiplies queries with the latents of a block and makes the softmax's weights; the other two hold half of
the result's columns each, which is all that registers hold, and multiply the weights with the same latents. Weights pass through shared memory, two blocks of
them, so that scores of one block, the softmax of another and the values of a third are under way together; the next block's scores begin before a block's softmax.
Blocks come last one first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sglang_triton.hopper_kernels import (
    BEGIN,
    COUNT,
    END,
    FIELDS,
    LN_2,
    NEG_INF,
    PART,
    POSITION,
    REQ,
    ROWS,
    TOKEN,
    load_block,
    masked,
    product_layout,
    row_layout,
    rows_of,
    softmax,
)

RANK = gl.constexpr(512)
ROPE = gl.constexpr(64)
HALF = gl.constexpr(256)  # columns of one group's result
HALVES = gl.constexpr(2)
KEYS = gl.constexpr(32)  # of a block
STAGES = gl.constexpr(4)  # blocks that are in shared memory at once
SLOTS = gl.constexpr(2)  # blocks of weights


@gluon.constexpr_function
def weight_layout() -> gl.NVMMASharedLayout:
    """Rows of KEYS 16-bit numbers."""
    return gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def vector_layout() -> gl.SwizzledSharedLayout:
    return gl.SwizzledSharedLayout(1, 1, 1, order=[0])


@gluon.jit
def load_latents(
    c_desc, pe_desc, c_smem, pe_smem, full, free, table, begin, end, num_blocks, PAGE: gl.constexpr
):  # fmt: skip
    """The loader."""
    for i in range(num_blocks):
        stage = i % STAGES
        rows = rows_of(0, table, begin + (num_blocks - 1 - i) * KEYS, end, KEYS, PAGE)
        mbarrier.wait(free.index(stage), i // STAGES & 1 ^ 1)
        load_block(c_desc, c_smem, stage * HALVES, full.index(stage), rows, 0, RANK, KEYS)
        load_block(pe_desc, pe_smem, stage, full.index(stage), rows, 0, ROPE, KEYS)


@gluon.jit
def latent_scores(q_smem, q_pe_smem, c_smem, pe_smem, full, i, layout: gl.constexpr):
    """Begins the scores of block i, once it is there: what to wait for."""
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    s = gl.zeros([ROWS, KEYS], gl.float32, layout)
    for h in gl.static_range(HALVES):
        keys = c_smem.index(stage * HALVES + h).permute((1, 0))
        s = warpgroup_mma(q_smem.index(h), keys, s, use_acc=h > 0, is_async=True)
    return warpgroup_mma(q_pe_smem, pe_smem.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def hand_over(i, p, decay, p_smem, decay_smem, p_full, p_free):
    """The weights of block i, and by how much what was summed before it decays."""
    slot = i % SLOTS
    mbarrier.wait(p_free.index(slot), i // SLOTS & 1 ^ 1)
    p_smem.index(slot).store(p)
    decay_smem.index(slot).store(decay)
    fence_async_shared()
    mbarrier.arrive(p_full.index(slot), count=1)


@gluon.jit
def load_queries(q, q_token, q_head, smem, row, count, GROUP: gl.constexpr, W: gl.constexpr, layout: gl.constexpr):
    """W dims of some rows' queries, zeros where there is no token."""
    column = gl.arange(0, W, gl.SliceLayout(0, layout))
    at = row // GROUP * q_token + row % GROUP * q_head
    smem.store(gl.load(q + (at[:, None] + column[None, :]), mask=(row // GROUP < count)[:, None], other=0.0))


@gluon.jit
def weigh_keys(
    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_smem, q_pe_smem, c_smem, pe_smem, p_smem, decay_smem, full, p_full, p_free,
    lse, part_lse, token, first_row, count, position, begin, end, part, num_blocks, scale,
    NUM_HEADS: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """ROWS rows' weights of all blocks, and last of all what their sums are divided by."""
    layout: gl.constexpr = product_layout(KEYS)
    wide: gl.constexpr = row_layout(HALF)
    narrow: gl.constexpr = row_layout(ROPE)
    dtype: gl.constexpr = c_smem.dtype
    token = token.to(gl.int64)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    for h in gl.static_range(HALVES):
        load_queries(
            q + token * q_token + h * HALF, q_token, q_head, q_smem.index(h), row, count, NUM_HEADS, HALF, wide
        )
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, narrow))
    load_queries(
        q_pe + token * q_pe_token, q_pe_token, q_pe_head, q_pe_smem, row, count, NUM_HEADS, ROPE, narrow
    )  # fmt: skip
    fence_async_shared()

    # Latents of keys that nobody sees are weighted by zero, and may be NaN. They lie in the last block alone.
    if end < begin + num_blocks * KEYS:
        mbarrier.wait(full.index(0), 0)
        seen = begin + (num_blocks - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, wide)) < end
        for h in gl.static_range(HALVES):
            c = c_smem.index(h).load(wide)
            c_smem.index(h).store(gl.where(seen[:, None], c, 0.0).to(dtype))
        fence_async_shared()

    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    last_key = gl.zeros_like(row) + end
    if CAUSAL:
        last_key = gl.minimum(position + row // NUM_HEADS + 1, end)
    top = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    final = num_blocks - 1
    s = warpgroup_mma_wait(0, deps=[latent_scores(q_smem, q_pe_smem, c_smem, pe_smem, full, 0, layout)])
    for i in range(final):
        next_s = latent_scores(q_smem, q_pe_smem, c_smem, pe_smem, full, i + 1, layout)
        s = masked(s, begin + (final - i) * KEYS, last_key, layout, KEYS)
        p, top, total, decay = softmax(s, top, total, scale, dtype, layout)
        hand_over(i, p, decay, p_smem, decay_smem, p_full, p_free)
        s = warpgroup_mma_wait(0, deps=[next_s])
    s = masked(s, begin, last_key, layout, KEYS)
    p, top, total, decay = softmax(s, top, total, scale, dtype, layout)
    hand_over(final, p, decay, p_smem, decay_smem, p_full, p_free)
    some = total > 0
    factor = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    hand_over(num_blocks, p, factor, p_smem, decay_smem, p_full, p_free)  # these weights nobody takes

    z = gl.where(some, (top + gl.log2(total)) * LN_2, NEG_INF)
    real = row // NUM_HEADS < count
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            gl.store(part_lse + part.to(gl.int64) * NUM_HEADS + row, z, mask=real)
    if LSE:  # noqa: SIM102
        if part < 0:
            gl.store(lse + token * NUM_HEADS + row, z, mask=real)


@gluon.jit
def sum_latents(
    half: gl.constexpr, c_smem, p_smem, decay_smem, full, free, p_full, p_free, o, part_o, token, first_row, count, part,
    num_blocks, NUM_HEADS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """HALF columns of ROWS rows' results."""
    # In two instructions: ptxas takes none with 128 results where a thread is launched with 128 registers, whatever it has later.
    layout: gl.constexpr = product_layout(HALF // 2)
    acc = gl.zeros([ROWS, HALF], gl.float32, layout)
    for i in range(num_blocks):
        stage, slot = i % STAGES, i % SLOTS
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        mbarrier.wait(p_full.index(slot), i // SLOTS & 1)
        acc = acc * decay_smem.index(slot).load(gl.SliceLayout(1, layout))[:, None]
        acc = warpgroup_mma(p_smem.index(slot), c_smem.index(stage * HALVES + half), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(stage), count=1)
        mbarrier.arrive(p_free.index(slot), count=1)
    slot = num_blocks % SLOTS
    mbarrier.wait(p_full.index(slot), num_blocks // SLOTS & 1)
    y = acc * decay_smem.index(slot).load(gl.SliceLayout(1, layout))[:, None]

    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = (half * HALF + gl.arange(0, HALF, gl.SliceLayout(0, layout)))[None, :]
    at = (row.to(gl.int64) * RANK)[:, None]  # a row's columns are then at fixed distances
    real = (row // NUM_HEADS < count)[:, None]
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            gl.store(part_o + part.to(gl.int64) * (NUM_HEADS * RANK) + at + column, y, mask=real)
    if part < 0:
        gl.store(o + token.to(gl.int64) * (NUM_HEADS * RANK) + at + column, y.to(c_smem.dtype), mask=real)


@gluon.jit
def _attend_latents_hopper(
    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, c_desc, pe_desc, table, num_pages, o, lse, part_o, part_lse, scale, work,
    counter, items, NUM_HEADS: gl.constexpr, BLOCKS: gl.constexpr, PAGE: gl.constexpr, CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """attn.mla_paged over one tier of a work list: a program for each item that there is room for and each ROWS of its rows, side by side.

    A row is a token's head. work[counter] is how many items there are; they stand from record `items` on. An item's `begin` is a multiple of KEYS.
    """
    unit = gl.program_id(0)
    if unit < gl.load(work + counter) * BLOCKS:
        record = work + (items + unit // BLOCKS) * FIELDS
        token, count, position = gl.load(record + TOKEN), gl.load(record + COUNT), gl.load(record + POSITION)
        begin, end, part = gl.load(record + BEGIN), gl.load(record + END), gl.load(record + PART)
        table += gl.load(record + REQ).to(gl.int64) * num_pages
        first_row = unit % BLOCKS * ROWS
        num_blocks = gl.maximum(gl.cdiv(end - begin, KEYS), 1)

        dtype: gl.constexpr = c_desc.dtype
        q_smem = gl.allocate_shared_memory(dtype, [HALVES, ROWS, HALF], c_desc.layout)
        q_pe_smem = gl.allocate_shared_memory(dtype, [ROWS, ROPE], pe_desc.layout)
        c_smem = gl.allocate_shared_memory(dtype, [STAGES * HALVES, KEYS, HALF], c_desc.layout)
        pe_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, ROPE], pe_desc.layout)
        p_smem = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, KEYS], weight_layout())
        decay_smem = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], vector_layout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        p_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        p_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=2)  # latents and rotated keys
            mbarrier.init(free.index(i), count=HALVES)
        for i in gl.static_range(SLOTS):
            mbarrier.init(p_full.index(i), count=1)
            mbarrier.init(p_free.index(i), count=HALVES)
        fence_async_shared()
        # Constexprs pass into partitions only as they stand in the call.
        gl.warp_specialize(
            [
                (sum_latents, (
                    0, c_smem, p_smem, decay_smem, full, free, p_full, p_free, o, part_o, token, first_row, count, part,
                    num_blocks, NUM_HEADS, SPLIT,
                )),
                (sum_latents, (
                    1, c_smem, p_smem, decay_smem, full, free, p_full, p_free, o, part_o, token, first_row, count, part,
                    num_blocks, NUM_HEADS, SPLIT,
                )),
                (weigh_keys, (
                    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_smem, q_pe_smem, c_smem, pe_smem, p_smem, decay_smem,
                    full, p_full, p_free, lse, part_lse, token, first_row, count, position, begin, end, part, num_blocks, scale,
                    NUM_HEADS, CAUSAL, SPLIT, LSE,
                )),
                (load_latents, (
                    c_desc, pe_desc, c_smem, pe_smem, full, free, table, begin, end, num_blocks, PAGE,
                )),
            ],
            [4, 4, 1],
            [168, 136, 40],
        )  # fmt: skip
