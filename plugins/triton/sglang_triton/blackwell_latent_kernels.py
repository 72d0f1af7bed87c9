"""Attention over latents for Blackwell, in Gluon: 128 rows of queries, a program for each HALF of the result's columns.

Tensor memory has 512 columns, which results of 128 rows alone would fill; 64 rows would take as long to multiply. So two programs share the rows: each makes all scores, and sums its own HALF of
the columns. What else there is room for: 64 columns of scores, and 192 with two thirds of the queries. These would not all fit into shared memory beside blocks of 64 keys, and an operand
of so many rows takes longer to read from there than to multiply.

A warp copies by TMA, one issues tcgen05, a group of four makes weights, a row a thread, and has them in shared memory. A block's columns come in two parts. The program's own HALF is the
keys' and later the values': OWN_STAGES blocks of it. The rest is done with once there are scores, and goes through a ring of chunks. The issuer begins the next block's scores before it waits
for a block's weights, so tensor cores multiply while the group is at the softmax. Results decay as `blackwell_kernels` says. Blocks come last one first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
)

from sglang_triton.blackwell_kernels import ROWS, lane_layout, sum_layout, weigh, write_part, write_rows
from sglang_triton.hopper_kernels import (
    BEGIN,
    CHUNK,
    COUNT,
    END,
    FIELDS,
    LN_2,
    NEG_INF,
    PART,
    POSITION,
    REQ,
    TOKEN,
    clean_values,
    load_block,
    masked,
    row_layout,
    rows_of,
)
from sglang_triton.hopper_latent_kernels import HALF, HALVES, RANK, ROPE, load_queries

KEYS = gl.constexpr(64)  # of a block
OWN_STAGES = gl.constexpr(3)  # blocks of a program's HALF that are in shared memory at once
OTHER = gl.constexpr(4)  # chunks of the other HALF
REST = gl.constexpr(5)  # chunks of a block that are keys only: the other HALF, and rotated keys
SLOTS = gl.constexpr(8)  # of these that are in shared memory at once
HELD = gl.constexpr(2)  # chunks of the rest whose queries are in tensor memory


@gluon.jit
def load_latents(
    own_desc, rest_desc, pe_desc, own, rest, own_full, own_free, rest_full, rest_free, table, half, begin, end, num_blocks,
    PAGE: gl.constexpr,
):  # fmt: skip
    """The loader."""
    other = (HALVES - 1 - half) * HALF
    for i in range(num_blocks):
        rows = rows_of(0, table, begin + (num_blocks - 1 - i) * KEYS, end, KEYS, PAGE)
        stage = i % OWN_STAGES
        mbarrier.wait(own_free.index(stage), i // OWN_STAGES & 1 ^ 1)
        load_block(own_desc, own, stage, own_full.index(stage), rows, half * HALF, HALF, KEYS)
        for c in gl.static_range(REST):
            slot, phase = (i * REST + c) % SLOTS, (i * REST + c) // SLOTS & 1
            full = rest_full.index(slot)
            mbarrier.wait(rest_free.index(slot), phase ^ 1)
            if c < OTHER:
                load_block(rest_desc, rest, slot, full, rows, other + c * CHUNK, CHUNK, KEYS)
            else:
                load_block(pe_desc, rest, slot, full, rows, 0, ROPE, KEYS)


@gluon.jit
def issue_scores(i, q_own, q_rest, q_smem, own, rest, scores, own_full, rest_full, rest_free, s_full):
    """Begins the scores of block i, as its latents come."""
    stage = i % OWN_STAGES
    mbarrier.wait(own_full.index(stage), i // OWN_STAGES & 1)
    tcgen05_mma(q_own, own.index(stage).permute((1, 0)), scores, use_acc=False)
    for c in gl.static_range(REST):
        slot, phase = (i * REST + c) % SLOTS, (i * REST + c) // SLOTS & 1
        mbarrier.wait(rest_full.index(slot), phase)
        keys = rest.index(slot).permute((1, 0))
        if c < HELD:
            tcgen05_mma(q_rest.index(c), keys, scores)
        else:
            tcgen05_mma(q_smem.index(c - HELD), keys, scores)
        tcgen05_commit(rest_free.index(slot))
    tcgen05_commit(s_full)


@gluon.jit
def issue_products(
    q_own, q_rest, q_smem, own, rest, p_smem, scores, results, own_full, own_free, rest_full, rest_free, q_full, s_full,
    s_free, p_full, p_free, num_blocks,
):  # fmt: skip
    """The issuer."""
    mbarrier.wait(q_full, 0)
    issue_scores(0, q_own, q_rest, q_smem, own, rest, scores, own_full, rest_full, rest_free, s_full)
    for i in range(num_blocks):
        if i + 1 < num_blocks:
            mbarrier.wait(s_free, i & 1)
            issue_scores(i + 1, q_own, q_rest, q_smem, own, rest, scores, own_full, rest_full, rest_free, s_full)
        stage = i % OWN_STAGES
        mbarrier.wait(p_full, i & 1)
        tcgen05_mma(p_smem, own.index(stage), results, use_acc=i > 0)
        tcgen05_commit(own_free.index(stage))
        tcgen05_commit(p_free)


@gluon.jit
def place_queries(
    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_own, q_rest, q_smem, staging, token, half, first_row, count,
    NUM_HEADS: gl.constexpr,
):  # fmt: skip
    """All columns of ROWS rows' queries. To tensor memory by way of shared memory: a row a thread is no way to read."""
    layout: gl.constexpr = row_layout(CHUNK)
    lanes: gl.constexpr = lane_layout(CHUNK)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    mine = q + token * q_token + half * HALF
    other = q + token * q_token + (HALVES - 1 - half) * HALF
    for c in gl.static_range(HALF // CHUNK):
        load_queries(mine + c * CHUNK, q_token, q_head, staging, row, count, NUM_HEADS, CHUNK, layout)
        q_own.slice(c * CHUNK, CHUNK).store(staging.load(lanes))
    for c in gl.static_range(HELD):
        load_queries(other + c * CHUNK, q_token, q_head, staging, row, count, NUM_HEADS, CHUNK, layout)
        q_rest.index(c).store(staging.load(lanes))
    for c in gl.static_range(OTHER - HELD):
        columns = other + (HELD + c) * CHUNK
        load_queries(columns, q_token, q_head, q_smem.index(c), row, count, NUM_HEADS, CHUNK, layout)
    rotated = q_pe + token * q_pe_token
    load_queries(rotated, q_pe_token, q_pe_head, q_smem.index(OTHER - HELD), row, count, NUM_HEADS, ROPE, layout)


@gluon.jit
def weigh_keys(
    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_own, q_rest, q_smem, own, p_smem, scores, results, own_full, q_full,
    s_full, s_free, p_full, p_free, o, lse, part_o, part_lse, token, half, first_row, count, position, begin, end, part,
    num_blocks, scale, NUM_HEADS: gl.constexpr, CAUSAL: gl.constexpr, SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """ROWS rows over all blocks, and in the end HALF columns of their results."""
    layout: gl.constexpr = lane_layout(KEYS)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = own.dtype
    token = token.to(gl.int64)
    place_queries(
        q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_own, q_rest, q_smem, p_smem, token, half, first_row, count, NUM_HEADS,
    )  # fmt: skip
    fence_async_shared()
    if end < begin + num_blocks * KEYS:  # before the issuer begins: these are keys as well
        mbarrier.wait(own_full.index(0), 0)
        clean_values(own.index(0), end - begin - (num_blocks - 1) * KEYS)
    mbarrier.arrive(q_full, count=1)

    row = first_row + gl.arange(0, ROWS, rows)
    last_key = gl.zeros_like(row) + end
    if CAUSAL:
        last_key = gl.minimum(position + row // NUM_HEADS + 1, end)
    top = gl.full([ROWS], NEG_INF, gl.float32, rows)
    total = gl.zeros([ROWS], gl.float32, rows)
    for i in range(num_blocks):
        mbarrier.wait(s_full, i & 1)
        s = scores.load(layout)
        mbarrier.arrive(s_free, count=1)
        s = masked(s, begin + (num_blocks - 1 - i) * KEYS, last_key, layout, KEYS)
        mbarrier.wait(p_free, i & 1 ^ 1)  # results and weights of the block before are nobody's now
        p, top, total = weigh(s, i, top, total, results, scale, HALF)
        p_smem.store(p.to(dtype))
        fence_async_shared()
        mbarrier.arrive(p_full, count=1)
        total += gl.sum(p, 1)

    some = total > 0
    factor = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    z = gl.where(some, (top + gl.log2(total)) * LN_2, NEG_INF)
    num_rows = count * NUM_HEADS
    real = row < num_rows
    mbarrier.wait(p_free, num_blocks - 1 & 1)
    # Results are written as if each row were HALVES of HALF columns.
    if SPLIT:  # noqa: SIM102  known to the compiler, and the next only to the device
        if part >= 0:
            skip = part.to(gl.int64) * NUM_HEADS
            write_part(results, factor, part_o + skip * RANK, row * HALVES + half, real, HALF)
            gl.store(part_lse + skip + row, z, mask=real & (half == 0))
    if part < 0:
        first = token * NUM_HEADS + first_row
        write_rows(results, factor, p_smem, 0, o + first * RANK, half, num_rows - first_row, HALVES, 1, HALF)
        if LSE:
            gl.store(lse + token * NUM_HEADS + row, z, mask=real & (half == 0))


@gluon.jit
def _attend_latents_blackwell(
    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, own_desc, rest_desc, pe_desc, table, num_pages, o, lse, part_o, part_lse,
    scale, work, counter, items, NUM_HEADS: gl.constexpr, BLOCKS: gl.constexpr, PAGE: gl.constexpr, CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """attn.mla_paged over one tier of a work list: for each item that there is room for, programs for each ROWS of its rows and each HALF of the columns, side by side.

    A row is a token's head. work[counter] is how many items there are; they stand from record `items` on. An item's `begin` is a multiple of KEYS.
    """
    unit = gl.program_id(0)
    if unit < gl.load(work + counter) * (BLOCKS * HALVES):
        record = work + (items + unit // (BLOCKS * HALVES)) * FIELDS
        token, count, position = gl.load(record + TOKEN), gl.load(record + COUNT), gl.load(record + POSITION)
        begin, end, part = gl.load(record + BEGIN), gl.load(record + END), gl.load(record + PART)
        table += gl.load(record + REQ).to(gl.int64) * num_pages
        half = unit % HALVES
        first_row = unit // HALVES % BLOCKS * ROWS
        num_blocks = gl.maximum(gl.cdiv(end - begin, KEYS), 1)

        dtype: gl.constexpr = own_desc.dtype
        q_smem = gl.allocate_shared_memory(dtype, [REST - HELD, ROWS, CHUNK], rest_desc.layout)
        own = gl.allocate_shared_memory(dtype, [OWN_STAGES, KEYS, HALF], own_desc.layout)
        rest = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, CHUNK], rest_desc.layout)
        p_smem = gl.allocate_shared_memory(dtype, [ROWS, KEYS], rest_desc.layout)
        q_own = allocate_tensor_memory(dtype, [ROWS, HALF], sum_layout(HALF))
        q_rest = allocate_tensor_memory(dtype, [HELD, ROWS, CHUNK], sum_layout(CHUNK))
        scores = allocate_tensor_memory(gl.float32, [ROWS, KEYS], sum_layout(KEYS))
        results = allocate_tensor_memory(gl.float32, [ROWS, HALF], sum_layout(HALF))
        own_full = gl.allocate_shared_memory(gl.int64, [OWN_STAGES, 1], mbarrier.MBarrierLayout())
        own_free = gl.allocate_shared_memory(gl.int64, [OWN_STAGES, 1], mbarrier.MBarrierLayout())
        rest_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        rest_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        s_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        s_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        p_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(OWN_STAGES):
            mbarrier.init(own_full.index(i), count=1)
            mbarrier.init(own_free.index(i), count=1)
        for i in gl.static_range(SLOTS):
            mbarrier.init(rest_full.index(i), count=1)
            mbarrier.init(rest_free.index(i), count=1)
        mbarrier.init(q_full, count=1)
        mbarrier.init(s_full, count=1)
        mbarrier.init(s_free, count=1)
        mbarrier.init(p_full, count=1)
        mbarrier.init(p_free, count=1)
        fence_async_shared()
        # Constexprs pass into partitions only as they stand in the call.
        gl.warp_specialize(
            [
                (weigh_keys, (
                    q, q_token, q_head, q_pe, q_pe_token, q_pe_head, q_own, q_rest, q_smem, own, p_smem, scores, results, own_full,
                    q_full, s_full, s_free, p_full, p_free, o, lse, part_o, part_lse, token, half, first_row, count, position,
                    begin, end, part, num_blocks, scale, NUM_HEADS, CAUSAL, SPLIT, LSE,
                )),
                (issue_products, (
                    q_own, q_rest, q_smem, own, rest, p_smem, scores, results, own_full, own_free, rest_full, rest_free, q_full,
                    s_full, s_free, p_full, p_free, num_blocks,
                )),
                (load_latents, (
                    own_desc, rest_desc, pe_desc, own, rest, own_full, own_free, rest_full, rest_free, table, half, begin, end,
                    num_blocks, PAGE,
                )),
            ],
            [1, 1],
            [64, 64],
        )  # fmt: skip
