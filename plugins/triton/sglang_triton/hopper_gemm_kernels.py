"""Products of fp8 codes for Hopper, in Gluon: a warp for copies by TMA, two groups of four for arithmetic by wgmma, results by TMA again.

Tensor cores keep some 14 bits of a running sum of fp8 products, so a sum is theirs for STEP columns of K only; then it is scaled and added to one in
float32, as DeepGEMM does (DeepSeek-V3, section 3.3.2). A tile is 128 rows by 256 columns: what a step reads from the L2 cache is then little enough for its
arithmetic. A group has 64 of the rows, and takes the columns by halves, as registers hold one product beside both sums; while it scales, the other group's
product is under way. Programs stay for many tiles, and the loader goes on to the next one by itself.
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

from sglang_triton.hopper_kernels import GROUPS, ROWS, async_load, product_layout

STEP = gl.constexpr(128)  # columns of K at a time: 128 bytes, the widest swizzle, and what shares a scale in blocks
HALF = gl.constexpr(128)  # columns of a result that are multiplied at once; they share a scale in blocks
HALVES = gl.constexpr(2)
# Tiles below each other that are done before those to the right: programs at work at once share most of what they read.
BAND = gl.constexpr(16)

# Triton 3.9 renamed it.
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
store_wait = tma.store_wait


@gluon.jit
def place(tile, T, N):
    """The first row and the first column of a tile."""
    num_rows, num_columns = gl.cdiv(T, GROUPS * ROWS), gl.cdiv(N, HALVES * HALF)
    band, inside = tile // (BAND * num_columns), tile % (BAND * num_columns)
    height = gl.minimum(num_rows - band * BAND, BAND)
    return (band * BAND + inside % height) * (GROUPS * ROWS), inside // height * (HALVES * HALF)


@gluon.jit
def load_tiles(
    x_desc, w_desc, x_smem, w_smem, left_full, right_full, free, T, N, num_tiles, STEPS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The loader: steps of all tiles in one row. Beyond the ends of a matrix come zeros."""
    i = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = place(tile, T, N)
        for k in range(STEPS):
            stage, phase = i % STAGES, i // STAGES & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(left_full.index(stage), (GROUPS * ROWS + HALF) * STEP)
            for g in gl.static_range(GROUPS):
                async_load(x_desc, [row + g * ROWS, k * STEP], left_full.index(stage), x_smem.index(stage * GROUPS + g))
            async_load(w_desc, [column, k * STEP], left_full.index(stage), w_smem.index(stage * HALVES))
            mbarrier.expect(right_full.index(stage), HALF * STEP)
            async_load(w_desc, [column + HALF, k * STEP], right_full.index(stage), w_smem.index(stage * HALVES + 1))
            i += 1


@gluon.jit
def product(x, w, layout: gl.constexpr):
    """x: [ROWS, STEP], w: [HALF, STEP] in shared memory -> float32[ROWS, HALF]."""
    part = gl.zeros([ROWS, HALF], gl.float32, layout)
    part = warpgroup_mma(x, w.permute((1, 0)), part, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def write_columns(
    total, y_desc, y_smem, first_row, first_column, row, x_scale, x_scale_row, w_scale, w_scale_row, bias, N,
    layout: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """As many columns as y_smem has. What lies beyond the ends of y is not written."""
    column = gl.minimum(first_column + gl.arange(0, y_smem.shape[1], gl.SliceLayout(0, layout)), N - 1)
    if not BLOCKS:
        row_scale = gl.load(x_scale + row * x_scale_row)
        column_scale = gl.load(w_scale + column * w_scale_row)
        total = total * (row_scale[:, None] * column_scale[None, :])
    if HAS_BIAS:
        total = total + gl.load(bias + column).to(gl.float32)[None, :]
    store_wait(0)  # what this group wrote before is still read from there
    y_smem.store(total.to(y_smem.dtype))
    fence_async_shared()
    async_store(y_desc, [first_row, first_column], y_smem)


@gluon.jit
def multiply_rows(
    group: gl.constexpr, x_smem, w_smem, y_smem, left_full, right_full, free, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N,
    num_tiles, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of each tile. Scales of a step arrive while its codes are multiplied."""
    layout: gl.constexpr = product_layout(HALF, 8)
    i = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_row, first_column = place(tile, T, N)
        first_row += group * ROWS
        # Beyond the last row and the last column the last one's scales are read: what they scale is not written.
        row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), T - 1)
        left_block = first_column // HALF
        right_block = gl.minimum(left_block + 1, (N - 1) // HALF)
        left = gl.zeros([ROWS, HALF], gl.float32, layout)
        right = gl.zeros([ROWS, HALF], gl.float32, layout)
        for k in range(STEPS):
            if BLOCKS:
                row_scale = gl.load(x_scale + (row * x_scale_row + k))
                left_scale = gl.load(w_scale + (left_block * w_scale_row + k))
                right_scale = gl.load(w_scale + (right_block * w_scale_row + k))
            stage, phase = i % STAGES, i // STAGES & 1
            mbarrier.wait(left_full.index(stage), phase)
            x = x_smem.index(stage * GROUPS + group)
            part = product(x, w_smem.index(stage * HALVES), layout)
            left += part * (row_scale * left_scale)[:, None] if BLOCKS else part
            # Waiting also keeps ptxas from moving the right product up to where the left one still has the registers: it spilled 300 bytes.
            mbarrier.wait(right_full.index(stage), phase)
            part = product(x, w_smem.index(stage * HALVES + 1), layout)
            mbarrier.arrive(free.index(stage), count=1)
            right += part * (row_scale * right_scale)[:, None] if BLOCKS else part
            i += 1
        write_columns(
            left, y_desc, y_smem.index(group), first_row, first_column, row, x_scale, x_scale_row, w_scale, w_scale_row,
            bias, N, layout, BLOCKS, HAS_BIAS,
        )  # fmt: skip
        write_columns(
            right, y_desc, y_smem.index(group), first_row, first_column + HALF, row, x_scale, x_scale_row, w_scale,
            w_scale_row, bias, N, layout, BLOCKS, HAS_BIAS,
        )  # fmt: skip
    store_wait(0)


@gluon.jit
def _linear_hopper(
    x_desc, w_desc, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N, num_tiles,
    K: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """x_desc: codes [T, K], w_desc: codes [N, K], y_desc: [T, N].

    BLOCKS: scales of x are [T, G], of w [ceil(N / HALF), G], G = ceil(K / STEP). Otherwise one a row: [T] and [N].
    """
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUPS, ROWS, STEP], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * HALVES, HALF, STEP], w_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, ROWS, HALF], y_desc.layout)
    left_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    right_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(left_full.index(i), count=1)
        mbarrier.init(right_full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    # Constexprs pass into partitions only as they stand in the call.
    gl.warp_specialize(
        [
            (multiply_rows, (
                0, x_smem, w_smem, y_smem, left_full, right_full, free, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N,
                num_tiles, STEPS, STAGES, BLOCKS, HAS_BIAS,
            )),
            (multiply_rows, (
                1, x_smem, w_smem, y_smem, left_full, right_full, free, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N,
                num_tiles, STEPS, STAGES, BLOCKS, HAS_BIAS,
            )),
            (load_tiles, (x_desc, w_desc, x_smem, w_smem, left_full, right_full, free, T, N, num_tiles, STEPS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
