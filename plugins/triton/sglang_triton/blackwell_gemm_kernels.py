"""Products of fp8 codes for Blackwell, in Gluon: a warp for copies by TMA, one that issues tcgen05, two groups of four that add up, results by TMA again.

As for Hopper (`hopper_gemm_kernels`), with which tiles, scales and the writing of results are shared: a sum is the tensor cores' for STEP columns of K only, then
it is scaled and added to one in float32. Here it lies in tensor memory, and there is room for two: while the groups add up one of them, the next is
multiplied. A group has all rows of a tile and one HALF of its columns, a row a thread.
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

from sglang_triton.blackwell_kernels import ROWS, lane_layout, sum_layout
from sglang_triton.hopper_gemm_kernels import HALF, HALVES, STEP, place, store_wait, write_columns
from sglang_triton.hopper_kernels import async_load

COLUMNS = gl.constexpr(256)  # of a tile: HALVES * HALF
PART = gl.constexpr(64)  # columns that a group reads and writes at once: 128 bytes of results, the widest swizzle
SUMS = gl.constexpr(2)  # in tensor memory, which they fill: 512 columns


@gluon.jit
def load_tiles(
    x_desc, w_desc, x_smem, w_smem, full, free, T, N, num_tiles, STEPS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The loader: steps of all tiles in one row. Beyond the ends of a matrix come zeros."""
    i = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = place(tile, T, N)
        for k in range(STEPS):
            stage = i % STAGES
            mbarrier.wait(free.index(stage), i // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), (ROWS + COLUMNS) * STEP)
            async_load(x_desc, [row, k * STEP], full.index(stage), x_smem.index(stage))
            async_load(w_desc, [column, k * STEP], full.index(stage), w_smem.index(stage))
            i += 1


@gluon.jit
def multiply_tiles(
    x_smem, w_smem, sums, full, free, done, drained, num_tiles, STEPS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The issuer: each step's product as a sum of its own. Its end frees the step's codes and gives the sum to the groups."""
    i = 0
    for _ in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        for _ in range(STEPS):
            stage, buffer = i % STAGES, i % SUMS
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            mbarrier.wait(drained.index(buffer), i // SUMS & 1 ^ 1)
            tcgen05_mma(x_smem.index(stage), w_smem.index(stage).permute((1, 0)), sums.index(buffer), use_acc=False)
            tcgen05_commit(free.index(stage))
            tcgen05_commit(done.index(buffer))
            i += 1


@gluon.jit
def add_columns(
    group: gl.constexpr, sums, y_smem, done, drained, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N, num_tiles,
    STEPS: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A HALF of each tile's columns, in two parts. Scales of a step arrive while its codes are multiplied."""
    layout: gl.constexpr = lane_layout(PART)
    START: gl.constexpr = group * HALF
    i = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_row, first_column = place(tile, T, N)
        first_column += START
        # Beyond the last row and the last column the last one's scales are read: what they scale is not written.
        row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), T - 1)
        block = gl.minimum(first_column // HALF, (N - 1) // HALF)
        left = gl.zeros([ROWS, PART], gl.float32, layout)
        right = gl.zeros([ROWS, PART], gl.float32, layout)
        for k in range(STEPS):
            if BLOCKS:
                scale = gl.load(x_scale + (row * x_scale_row + k)) * gl.load(w_scale + (block * w_scale_row + k))
            buffer = i % SUMS
            mbarrier.wait(done.index(buffer), i // SUMS & 1)
            part = sums.index(buffer).slice(START, PART).load(layout)
            left += part * scale[:, None] if BLOCKS else part
            part = sums.index(buffer).slice(START + PART, PART).load(layout)
            mbarrier.arrive(drained.index(buffer), count=1)
            right += part * scale[:, None] if BLOCKS else part
            i += 1
        write_columns(
            left, y_desc, y_smem.index(group), first_row, first_column, row, x_scale, x_scale_row, w_scale, w_scale_row,
            bias, N, layout, BLOCKS, HAS_BIAS,
        )  # fmt: skip
        write_columns(
            right, y_desc, y_smem.index(group), first_row, first_column + PART, row, x_scale, x_scale_row, w_scale,
            w_scale_row, bias, N, layout, BLOCKS, HAS_BIAS,
        )  # fmt: skip
    store_wait(0)


@gluon.jit
def _linear_blackwell(
    x_desc, w_desc, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N, num_tiles,
    K: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """x_desc: codes [T, K], w_desc: codes [N, K], y_desc: [T, N].

    BLOCKS: scales of x are [T, G], of w [ceil(N / HALF), G], G = ceil(K / STEP). Otherwise one a row: [T] and [N].
    """
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, STEP], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, COLUMNS, STEP], w_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [HALVES, ROWS, PART], y_desc.layout)
    sums = allocate_tensor_memory(gl.float32, [SUMS, ROWS, COLUMNS], sum_layout(COLUMNS))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [SUMS, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [SUMS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(SUMS):
        mbarrier.init(done.index(i), count=1)
        mbarrier.init(drained.index(i), count=HALVES)
    fence_async_shared()
    # Constexprs pass into partitions only as they stand in the call.
    gl.warp_specialize(
        [
            (add_columns, (
                0, sums, y_smem, done, drained, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N, num_tiles,
                STEPS, BLOCKS, HAS_BIAS,
            )),
            (add_columns, (
                1, sums, y_smem, done, drained, y_desc, x_scale, x_scale_row, w_scale, w_scale_row, bias, T, N, num_tiles,
                STEPS, BLOCKS, HAS_BIAS,
            )),
            (multiply_tiles, (x_smem, w_smem, sums, full, free, done, drained, num_tiles, STEPS, STAGES)),
            (load_tiles, (x_desc, w_desc, x_smem, w_smem, full, free, T, N, num_tiles, STEPS, STAGES)),
        ],
        [4, 1, 1],
        [232, 32, 32],
    )  # fmt: skip
