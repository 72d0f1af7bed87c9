"""ssm.causal_conv1d: one launch where no req extends by more than a token, and two where some do.

A req's state may be written where it is read. So what reads it as the inputs of rows is launched before what moves it on; in a step of
single tokens one program does both for its channels of a req.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api import StatePool
from sglang_core.api.ops import StatePlan
from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import rounded, sigmoid, widen
from sglang_triton.ragged import count_up_to
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: StatePool,
    layer: int,
    plan: StatePlan,
    *,
    activation: str | None = None,
) -> Tensor:
    """x: [T, C], weight: [C, W], bias: [C] -> [T, C]; states of W - 1 inputs are read and written, as the op's body says."""
    assert activation in (None, "silu"), f"activation={activation!r}"
    x, weight, tail = dense_last(x), dense_last(weight), pool.conv(layer)
    (num_tokens, channels), (_, width), num_reqs = x.shape, weight.shape, plan.static.num_reqs
    out = torch.empty(num_tokens, channels, dtype=x.dtype, device=x.device)
    single = not plan.static.active  # nobody extends by more than a token
    config = dict(choose("ssm.causal_conv1d", C=channels))
    block_t = config.pop("BLOCK_T")
    blocks = triton.cdiv(channels, config["BLOCK_C"])
    inputs = (x, weight, x if bias is None else bias, tail, out, plan.cu_extend, plan.read_slots)
    sizes = (num_tokens, num_reqs, channels, x.stride(0), weight.stride(0))
    facts = {"W": width, "HAS_BIAS": bias is not None, "SILU": activation == "silu"}
    if num_tokens > 0 and not single:
        grid = (triton.cdiv(num_tokens, block_t), blocks)
        _rows[grid](*inputs, *sizes, num_reqs.bit_length(), BLOCK_T=block_t, **facts, **config)
    programs = max(num_reqs, num_tokens) if single else num_reqs
    if programs > 0:
        block_w = triton.next_power_of_2(width)
        _states[(programs, blocks)](
            *inputs, plan.write_slots, *sizes, SINGLE=single, BLOCK_W=block_w, **facts, **config
        )
    return out


@triton.jit
def _rows(
    x,
    weight,
    bias,
    tail,
    out,
    cu,
    read,
    T,
    R,
    C,
    x_stride,
    weight_stride,
    steps,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_T tokens, of whichever reqs, times BLOCK_C channels."""
    take_turn()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    req = count_up_to(cu, token, R, steps, 1, 0)
    real = (token < T) & (req < R)
    offset = token - tl.load(cu + req, real, other=0)
    slot = tl.load(read + req, real, other=0).to(tl.int64)
    y = convolved(
        x, weight, bias, tail, token, offset, slot, real, column, C, x_stride, weight_stride, W, HAS_BIAS, SILU
    )
    target = out + token[:, None].to(tl.int64) * C + column[None, :]
    tl.store(target, rounded(y, out.dtype.element_ty), (token < T)[:, None] & (column < C)[None, :])


@triton.jit
def _states(
    x,
    weight,
    bias,
    tail,
    out,
    cu,
    read,
    write,
    T,
    R,
    C,
    x_stride,
    weight_stride,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the state of a req, BLOCK_C channels of it. With SINGLE also the output of its one token, if it has one; and
    of the token of its own number, zeros, if that is of no req."""
    take_turn()
    index = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if index < R:
        start, stop = tl.load(cu + index), tl.load(cu + index + 1)
        slot = tl.load(read + index).to(tl.int64)
        if SINGLE:
            token = start + tl.arange(0, 1)
            real = token < stop
            offset = token * 0
            slots = slot + offset
            y = convolved(
                x, weight, bias, tail, token, offset, slots, real, column, C, x_stride, weight_stride, W, HAS_BIAS, SILU
            )
            target = out + token[:, None].to(tl.int64) * C + column[None, :]
            tl.store(target, rounded(y, out.dtype.element_ty), real[:, None] & (column < C)[None, :])
        place = tl.arange(0, BLOCK_W)
        token = stop - (W - 1) + place
        kept = inputs_at(x, tail, token, token - start, slot + place * 0, place < W - 1, column, C, x_stride, W - 1)
        # Another thread may read what this one writes: an input moves up by a row.
        tl.debug_barrier()
        row = tl.load(write + index).to(tl.int64) * (W - 1) + place
        there = (place < W - 1)[:, None] & (column < C)[None, :]
        tl.store(tail + row[:, None] * C + column[None, :], rounded(kept, tail.dtype.element_ty), there)
    if SINGLE:
        width = tl.where((index >= tl.load(cu + R)) & (index < T), C, 0)
        tl.store(out + tl.cast(index, tl.int64) * C + column, tl.zeros([BLOCK_C], out.dtype.element_ty), column < width)


@triton.jit
def convolved(
    x,
    weight,
    bias,
    tail,
    token,
    offset,
    slot,
    real,
    column,
    C,
    x_stride,
    weight_stride,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """token, offset, slot, real: [n], column: [BLOCK_C] -> float32[n, BLOCK_C], zeros where not `real`. Sums in the body's order."""
    y = tl.zeros([token.shape[0], column.shape[0]], tl.float32)
    if HAS_BIAS:
        y += widen(tl.load(bias + column, column < C, other=0.0))[None, :]
    for tap in tl.static_range(W):
        back = W - 1 - tap
        given = inputs_at(x, tail, token - back, offset - back, slot, real, column, C, x_stride, W - 1)
        y += given * widen(tl.load(weight + column * weight_stride + tap, column < C, other=0.0))[None, :]
    if SILU:
        y *= sigmoid(y)
    return tl.where(real[:, None], y, 0.0)


@triton.jit
def inputs_at(x, tail, token, offset, slot, real, column, C, x_stride, KEPT: tl.constexpr):
    """Row `token` of x where `offset`, its place among the req's new tokens, is not negative; else out of the state in `slot`, which
    is zeros for slot 0. token, offset, slot, real: [n], column: [BLOCK_C] -> float32[n, BLOCK_C]."""
    inside = real[:, None] & (column < C)[None, :]
    new = (offset >= 0)[:, None]
    fresh = tl.load(x + token[:, None].to(tl.int64) * x_stride + column[None, :], inside & new, other=0.0)
    row = slot * KEPT + offset + KEPT
    stored = tl.load(
        tail + row[:, None] * C + column[None, :], inside & (offset < 0)[:, None] & (slot > 0)[:, None], other=0.0
    )
    return tl.where(new, widen(fresh), widen(stored))


_INTEGERS = ("T", "R", "C", "x_stride", "weight_stride", "steps")
_SIGNATURE = {
    **dict.fromkeys(("x", "weight", "bias", "tail", "out"), "*bf16"),
    **dict.fromkeys(("cu", "read", "write"), "*i32"),
    **dict.fromkeys(_INTEGERS, "i32"),
}
_FACTS = {"W": 4, "BLOCK_W": 4, "HAS_BIAS": False, "SILU": True}
AOT = tuple(
    AotSpec(
        op="ssm.causal_conv1d",
        name=name,
        kernel=kernel,
        signature=_SIGNATURE,
        constexprs=_FACTS | facts,
        sizes={"C": 8192},
        odd=("T", "R", "weight_stride", "steps"),
    )
    for name, kernel, facts in (
        ("rows", _rows, {}),
        ("states", _states, {"SINGLE": False}),
        ("states and a row", _states, {"SINGLE": True}),
    )
)
