"""Attention of packed rows for Hopper, in Gluon: queries, keys and values by TMA, products by wgmma, a warp for copies and two groups of four for arithmetic.

The schedule is FlashAttention-3's (Shah et al. 2024): while the tensor cores multiply the weights of one block of keys with its values, the group
that waits for them works at the softmax of the next block. Two groups of 64 rows each share the blocks that a third, the loader, brings ahead.
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


# Triton 3.9 renamed it.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(columns: int) -> gl.NVMMADistributedLayout:
    """ROWS by `columns` of float32, as wgmma leaves them with a group of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns: int) -> gl.BlockedLayout:
    """Rows of `columns` 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def load_blocks(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free,
    q_row, q_col, key, k_col, v_col, num_blocks,
    W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loader: all queries of the program, then blocks of keys and of values, the last one first."""
    CHUNKS: gl.constexpr = W // CHUNK
    mbarrier.expect(q_full, GROUPS * ROWS * W * 2)
    for i in gl.static_range(GROUPS * CHUNKS):
        async_load(q_desc, [q_row + i // CHUNKS * ROWS, q_col + i % CHUNKS * CHUNK], q_full, q_smem.index(i))
    for i in range(num_blocks):
        stage, phase = i % STAGES, i // STAGES & 1
        row = key + (num_blocks - 1 - i) * N
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), N * W * 2)
        for c in gl.static_range(CHUNKS):
            async_load(k_desc, [row, k_col + c * CHUNK], k_full.index(stage), k_smem.index(stage * CHUNKS + c))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), N * WV * 2)
        async_load(v_desc, [row, v_col], v_full.index(stage), v_smem.index(stage))


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
    v_free, p, acc, top, total, scale, last_key, num_blocks,
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
        s = masked(s, (num_blocks - 1 - i) * N, last_key, s_layout, N)
    new_p, top, total, decay = softmax(s, top, total, scale, dtype, gl.DotOperandLayout(0, o_layout, 2))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    return new_p, acc, top, total


@gluon.jit
def attend_rows(
    group: gl.constexpr, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, v_clean,
    o, lse, token, head, count, position, end, num_blocks, num_whole, scale,
    NUM_HEADS: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """ROWS queries over all blocks, the last one first. Of the first `num_whole` blocks every row sees all keys."""
    s_layout: gl.constexpr = product_layout(N)
    o_layout: gl.constexpr = product_layout(WV)
    dtype: gl.constexpr = v_smem.dtype
    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    last_key = gl.zeros_like(row) + end
    if CAUSAL:
        last_key = gl.minimum(position + row + 1, end)

    # Values of keys that nobody sees are weighted by zero, and may be NaN. They lie in the last block alone.
    if end < num_blocks * N:
        mbarrier.wait(v_full.index(0), 0)
        if group == 0:
            cut: gl.constexpr = row_layout(WV)
            seen = (num_blocks - 1) * N + gl.arange(0, N, gl.SliceLayout(1, cut)) < end
            v = v_smem.index(0).load(cut)
            v_smem.index(0).store(gl.where(seen[:, None], v, 0.0).to(dtype))
            fence_async_shared()
            mbarrier.arrive(v_clean, count=1)
        mbarrier.wait(v_clean, 0)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[scores(q_smem, k_smem, group, 0, s_layout, N, W // CHUNK)])
    mbarrier.arrive(k_free.index(0), count=1)
    s = masked(s, (num_blocks - 1) * N, last_key, s_layout, N)
    top = gl.full([ROWS], NEG_INF, gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([ROWS, WV], gl.float32, o_layout)
    p, top, total, decay = softmax(s, top, total, scale, dtype, gl.DotOperandLayout(0, o_layout, 2))
    for i in range(1, num_blocks - num_whole):
        p, acc, top, total = next_block(
            i, s_layout, o_layout, group, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free,
            p, acc, top, total, scale, last_key, num_blocks, W, N, STAGES, True,
        )  # fmt: skip
    for i in range(gl.maximum(1, num_blocks - num_whole), num_blocks):
        p, acc, top, total = next_block(
            i, s_layout, o_layout, group, q_smem, k_smem, v_smem, k_full, k_free, v_full, v_free,
            p, acc, top, total, scale, last_key, num_blocks, W, N, STAGES, False,
        )  # fmt: skip
    final = num_blocks - 1
    mbarrier.wait(v_full.index(final % STAGES), final // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(final % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    some = total > 0
    factor = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    y = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
    o_row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    col = gl.arange(0, WV, gl.SliceLayout(0, o_layout))
    o += (token.to(gl.int64) * NUM_HEADS + head) * WV
    gl.store(o + o_row[:, None] * (NUM_HEADS * WV) + col[None, :], y.to(dtype), mask=(o_row < count)[:, None])
    if LSE:
        z = gl.where(some, (top + gl.log2(total)) * LN_2, NEG_INF)
        gl.store(lse + token.to(gl.int64) * NUM_HEADS + head + row * NUM_HEADS, z, mask=row < count)


@gluon.jit
def _attend_hopper(
    q_desc, k_desc, v_desc, q_head, k_head, v_head, cu_q, cu_k, o, lse, scale, num_reqs, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, WV: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """A program for each tile of queries of one head that a req of the longest length has, last tile first: it has most keys if causal."""
    M: gl.constexpr = GROUPS * ROWS
    CHUNKS: gl.constexpr = W // CHUNK
    dtype: gl.constexpr = q_desc.dtype
    unit = gl.program_id(0)
    head, unit = unit // (num_tiles * num_reqs), unit % (num_tiles * num_reqs)
    tile, req = num_tiles - 1 - unit // num_reqs, unit % num_reqs
    first, last = gl.load(cu_q + req), gl.load(cu_q + req + 1)
    key = gl.load(cu_k + req)
    num_keys = gl.load(cu_k + req + 1) - key
    # A req that is shorter has no rows here: one block of keys is read, and nothing is written.
    count = gl.maximum(gl.minimum(last - first - tile * M, M), 0)
    position = tile * M + num_keys - (last - first)
    end, whole = num_keys, num_keys
    if CAUSAL:
        end = gl.maximum(gl.minimum(position + count, num_keys), 0)
        whole = gl.maximum(gl.minimum(position + 1, end), 0)
    if count == 0:
        end, whole = 0, 0
    num_blocks = gl.maximum(gl.cdiv(end, N), 1)

    q_smem = gl.allocate_shared_memory(dtype, [GROUPS * CHUNKS, ROWS, CHUNK], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, N, CHUNK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, N, WV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(v_clean, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()

    kv_head, row, whole = head // GROUP, first + tile * M, whole // N
    # Constexprs pass into partitions only as they stand in the call.
    gl.warp_specialize(
        [
            (attend_rows, (
                0, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, v_clean, o, lse,
                row, head, count, position, end, num_blocks, whole, scale, NUM_HEADS, W, WV, N, STAGES, CAUSAL, LSE,
            )),
            (attend_rows, (
                1, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, v_clean, o, lse,
                row, head, count, position, end, num_blocks, whole, scale, NUM_HEADS, W, WV, N, STAGES, CAUSAL, LSE,
            )),
            (load_blocks, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free,
                row, head * q_head, key, kv_head * k_head, kv_head * v_head, num_blocks, W, WV, N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
