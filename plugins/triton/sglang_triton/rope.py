"""rope.apply: queries and keys in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import RopeSpec
from sglang_triton.aot_spec import WIDE, AotSpec
from sglang_triton.numerics import rounded, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def rope_apply(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], positions: int32[T], table: float32[L, rotary_dim] -> q, k rotated."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.shape[0]:
        q, k, table = dense_last(q), dense_last(k), dense_last(table)
        config = choose("rope.apply", D=spec.head_dim)
        q_blocks, k_blocks = (triton.cdiv(x.shape[1], config["BLOCK_H"]) for x in (q, k))
        _rope[(triton.cdiv(q.shape[0], config["BLOCK_T"]), q_blocks + k_blocks)](
            q,
            k,
            positions,
            table,
            q_out,
            k_out,
            q.shape[0],
            q.shape[1],
            k.shape[1],
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            positions.stride(0),
            table.stride(0),
            D=spec.head_dim,
            ROTARY=spec.rotary_dim,
            INTERLEAVED=spec.style == "interleaved",
            BLOCK_HALF=triton.next_power_of_2(spec.rotary_dim // 2),
            BLOCK_REST=triton.next_power_of_2(max(1, spec.head_dim - spec.rotary_dim)),
            **config,
        )
    return q_out, k_out


@triton.jit
def _rope(
    q,
    k,
    positions,
    table,
    q_out,
    k_out,
    T,
    Hq,
    Hk,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    positions_stride,
    table_stride,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_T tokens by BLOCK_H heads, of queries or, from block cdiv(Hq, BLOCK_H) on, of keys."""
    take_turn()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    angle = tl.arange(0, BLOCK_HALF)
    there = (token[:, None] < T) & (angle[None, :] < ROTARY // 2)
    position = tl.load(positions + token.to(tl.int64) * positions_stride, token < T, other=0).to(tl.int64)
    at = table + position[:, None] * table_stride + angle[None, :]
    cos = tl.load(at, there, other=0.0)[:, None, :]
    sin = tl.load(at + ROTARY // 2, there, other=0.0)[:, None, :]
    block = tl.program_id(1)
    q_blocks = tl.cdiv(Hq, BLOCK_H)
    if block < q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        turn(
            q,
            q_out,
            cos,
            sin,
            token,
            head,
            T,
            Hq,
            q_stride_t,
            q_stride_h,
            D,
            ROTARY,
            INTERLEAVED,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        turn(
            k,
            k_out,
            cos,
            sin,
            token,
            head,
            T,
            Hk,
            k_stride_t,
            k_stride_h,
            D,
            ROTARY,
            INTERLEAVED,
            BLOCK_HALF,
            BLOCK_REST,
        )


@triton.jit
def turn(
    x,
    y,
    cos,
    sin,
    token,
    head,
    T,
    H,
    stride_t,
    stride_h,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """x: [T, H, D] -> y: the same, dense. cos, sin: float32[BLOCK_T, 1, BLOCK_HALF]."""
    token = token[:, None, None].to(tl.int64)
    head = head[None, :, None]
    there = (token < T) & (head < H)
    source, target = x + token * stride_t + head * stride_h, y + (token * H + head) * D
    angle = tl.arange(0, BLOCK_HALF)[None, None, :]
    if INTERLEAVED:
        first, second = 2 * angle, 2 * angle + 1
    else:
        first, second = angle, angle + ROTARY // 2
    inside = there & (angle < ROTARY // 2)
    a = widen(tl.load(source + first, inside, other=0.0))
    b = widen(tl.load(source + second, inside, other=0.0))
    tl.store(target + first, rounded(a * cos - b * sin, y.dtype.element_ty), inside)
    tl.store(target + second, rounded(b * cos + a * sin, y.dtype.element_ty), inside)
    if ROTARY < D:
        rest = ROTARY + tl.arange(0, BLOCK_REST)[None, None, :]
        passing = there & (rest < D)
        tl.store(target + rest, tl.load(source + rest, passing, other=0.0), passing)


_POINTERS = {"q": "*bf16", "k": "*bf16", "positions": "*i32", "table": "*fp32", "q_out": "*bf16", "k_out": "*bf16"}
_STRIDES = ("q_stride_t", "q_stride_h", "k_stride_t", "k_stride_h", "positions_stride", "table_stride")
AOT = tuple(
    AotSpec(
        op="rope.apply",
        name=name,
        kernel=_rope,
        signature=_POINTERS | dict.fromkeys(("T", "Hq", "Hk", *_STRIDES), "i32"),
        constexprs={
            "D": dim,
            "ROTARY": rotary,
            "INTERLEAVED": interleaved,
            "BLOCK_HALF": rotary // 2,
            "BLOCK_REST": triton.next_power_of_2(max(1, dim - rotary)),
        },
        sizes={"D": dim},
        odd=("T", "Hq", "Hk", "positions_stride"),
        instructions={} if interleaved else WIDE,  # neighbours are turned together: pieces of two bytes
    )
    for name, dim, rotary, interleaved in (
        ("D=64, interleaved", 64, 64, True),
        ("D=128", 128, 128, False),
        ("D=256, partial", 256, 64, False),
    )
)
