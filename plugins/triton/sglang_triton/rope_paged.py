"""attn.rope_paged: one launch that normalises and rotates queries and keys and writes keys and values to the pool, then attention.

Apart, it is up to four launches (two norms, the rotation, the write) that each read and write queries or keys whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, HeadNorms, Plan, RopeSpec
from sglang_triton import attention
from sglang_triton.aot_spec import SATFINITE, AotSpec
from sglang_triton.kv_write import encoded
from sglang_triton.numerics import rounded, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

Paged = Callable[..., Tensor | tuple[Tensor, Tensor]]


def rope_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    rotary: RopeSpec,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: Plan,
    *,
    head_norms: HeadNorms | None = None,
    sinks: Tensor | None = None,
    lse: bool = False,
    paged: Paged = attention.paged,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], v: [T, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). `paged`: another provider's attention, with its plan."""
    q = turn_and_write(q, k, v, positions, table, rotary, pool, layer, plan.slot_mapping, head_norms)
    return paged(q, None, None, pool, layer, spec, plan, sinks=sinks, lse=lse)


def turn_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    rotary: RopeSpec,
    pool: Pool,
    layer: int,
    slot_mapping: Tensor,
    head_norms: HeadNorms | None,
) -> Tensor:
    """-> q, normalised and rotated: [T, Hq, D], dense. k, likewise, and v are in the pool."""
    num_tokens, q_heads, dim = q.shape
    kv_heads, v_dim = v.shape[1:]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return q_out
    q, k, v, table = dense_last(q), dense_last(k), dense_last(v), dense_last(table)
    k_leaf, v_leaf, *scales = pool.layer_leaves(layer)
    scaling = pool.spec.scaling
    if scaling == "static":
        scales = [pool.k_scale(layer), pool.v_scale(layer)]
        k_leaf, v_leaf = k_leaf.view(torch.uint8), v_leaf.view(torch.uint8)
    k_scale, v_scale = scales or (slot_mapping, slot_mapping)  # any pointer: it is not looked at
    q_weight, k_weight, eps = head_norms or (table, table, 0.0)
    config = choose("attn.rope_paged", D=max(dim, v_dim))
    q_blocks, kv_blocks = (triton.cdiv(heads, config["BLOCK_H"]) for heads in (q_heads, kv_heads))
    _turn_and_write[(triton.cdiv(num_tokens, config["BLOCK_T"]), q_blocks + 2 * kv_blocks)](
        q, k, v, positions, table, q_weight, k_weight, q_out, k_leaf, v_leaf, k_scale, v_scale, slot_mapping,
        num_tokens, q_heads, kv_heads, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        positions.stride(0), table.stride(0), slot_mapping.stride(0), eps,
        DV=v_dim, SCALING=scaling, NORM=head_norms is not None, BLOCK_DV=triton.next_power_of_2(v_dim),
        **shape_of(dim, rotary.rotary_dim, rotary.style == "interleaved"), **config,
    )  # fmt: skip
    return q_out


def shape_of(dim: int, rotary: int, interleaved: bool) -> dict[str, int | bool]:
    """The constexprs of a head and of what is rotated of it."""
    halves = {"BLOCK_HALF": triton.next_power_of_2(max(1, rotary // 2))}
    rest = {"BLOCK_REST": triton.next_power_of_2(max(1, dim - rotary))}
    return {"D": dim, "ROTARY": rotary, "INTERLEAVED": interleaved, **halves, **rest}


@triton.jit
def _turn_and_write(
    q,
    k,
    v,
    positions,
    table,
    q_weight,
    k_weight,
    q_out,
    k_leaf,
    v_leaf,
    k_scale,
    v_scale,
    slots,
    T,
    Hq,
    Hk,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    positions_stride,
    table_stride,
    slots_stride,
    eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALING: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SATFINITE: tl.constexpr,
):
    """One program: BLOCK_T tokens by BLOCK_H heads, of queries, then of keys, then of values. Leaves are dense, [slots, Hk, D]."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None].to(tl.int64)
    block = tl.program_id(1)
    q_blocks, kv_blocks = tl.cdiv(Hq, BLOCK_H), tl.cdiv(Hk, BLOCK_H)
    angle = tl.arange(0, BLOCK_HALF)[None, None, :]
    if INTERLEAVED:
        first, second = 2 * angle, 2 * angle + 1
    else:
        first, second = angle, angle + ROTARY // 2
    rest = ROTARY + tl.arange(0, BLOCK_REST)[None, None, :]
    turns, passes = angle < ROTARY // 2, rest < D
    if block < q_blocks + kv_blocks:
        position = tl.load(positions + token * positions_stride, token < T, other=0).to(tl.int64)
        at = table + position * table_stride + angle
        cos = tl.load(at, (token < T) & turns, other=0.0)
        sin = tl.load(at + ROTARY // 2, (token < T) & turns, other=0.0)
        if block < q_blocks:
            head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
            there = (token < T) & (head < Hq)
            a, b, c = turned(
                q + token * q_stride_t + head * q_stride_h, q_weight, cos, sin, there, first, second, rest, turns, passes,
                eps, q_out.dtype.element_ty, D, ROTARY, NORM,
            )  # fmt: skip
            to = q_out + (token * Hq + head) * D
            tl.store(to + first, rounded(a, q_out.dtype.element_ty), there & turns)
            tl.store(to + second, rounded(b, q_out.dtype.element_ty), there & turns)
            if ROTARY < D:
                tl.store(to + rest, rounded(c, q_out.dtype.element_ty), there & passes)
        else:
            head = ((block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
            there = (token < T) & (head < Hk)
            a, b, c = turned(
                k + token * k_stride_t + head * k_stride_h, k_weight, cos, sin, there, first, second, rest, turns, passes,
                eps, k.dtype.element_ty, D, ROTARY, NORM,
            )  # fmt: skip
            slot = tl.load(slots + token * slots_stride, token < T, other=0).to(tl.int64)
            step = 1.0
            if SCALING == "static":
                step = tl.load(k_scale + head, head < Hk, other=1.0)
            elif SCALING == "dynamic":
                step = tl.maximum(largest(a), largest(b))
                if ROTARY < D:
                    step = tl.maximum(step, largest(c))
                step = tl.div_rn(step, 127.0)
                tl.store(k_scale + slot * Hk + head, step, there)
            target = k_leaf + (slot * Hk + head) * D
            tl.store(target + first, encoded(a, step, k_leaf.dtype.element_ty, SCALING, SATFINITE), there & turns)
            tl.store(target + second, encoded(b, step, k_leaf.dtype.element_ty, SCALING, SATFINITE), there & turns)
            if ROTARY < D:
                tl.store(target + rest, encoded(c, step, k_leaf.dtype.element_ty, SCALING, SATFINITE), there & passes)
    else:
        head = ((block - q_blocks - kv_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
        column = tl.arange(0, BLOCK_DV)[None, None, :]
        there = (token < T) & (head < Hk)
        x = widen(tl.load(v + token * v_stride_t + head * v_stride_h + column, there & (column < DV), other=0.0))
        slot = tl.load(slots + token * slots_stride, token < T, other=0).to(tl.int64)
        step = 1.0
        if SCALING == "static":
            step = tl.load(v_scale + head, head < Hk, other=1.0)
        elif SCALING == "dynamic":
            step = tl.div_rn(largest(x), 127.0)
            tl.store(v_scale + slot * Hk + head, step, there)
        code = encoded(x, step, v_leaf.dtype.element_ty, SCALING, SATFINITE)
        tl.store(v_leaf + (slot * Hk + head) * DV + column, code, there & (column < DV))


@triton.jit
def turned(
    source,
    weight,
    cos,
    sin,
    there,
    first,
    second,
    rest,
    turns,
    passes,
    eps,
    dtype: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads at `source`: [BLOCK_T, BLOCK_H, 1] -> the two sides of their pairs and their other dims, float32, as `dtype` rounds them."""
    a = widen(tl.load(source + first, there & turns, other=0.0))
    b = widen(tl.load(source + second, there & turns, other=0.0))
    c = widen(tl.load(source + rest, there & passes, other=0.0))
    if NORM:
        squares = tl.sum(a * a, axis=2, keep_dims=True) + tl.sum(b * b, axis=2, keep_dims=True)
        if ROTARY < D:
            squares += tl.sum(c * c, axis=2, keep_dims=True)
        scale = tl.rsqrt(squares / D + eps)
        a = widen(rounded(a * scale * widen(tl.load(weight + first, turns, other=0.0)), dtype))
        b = widen(rounded(b * scale * widen(tl.load(weight + second, turns, other=0.0)), dtype))
        c = widen(rounded(c * scale * widen(tl.load(weight + rest, passes, other=0.0)), dtype))
    return widen(rounded(a * cos - b * sin, dtype)), widen(rounded(b * cos + a * sin, dtype)), c


@triton.jit
def largest(x):
    """x: float32[BLOCK_T, BLOCK_H, n] -> the largest size of each row: [BLOCK_T, BLOCK_H, 1]."""
    return tl.max(tl.abs(x), axis=2, keep_dims=True)


_STORED = {"none": "*bf16", "static": "*u8", "dynamic": "*i8"}
_ROWS = dict.fromkeys(("q", "k", "v", "q_weight", "k_weight", "q_out"), "*bf16")
_STRIDES = (
    *("q_stride_t", "q_stride_h", "k_stride_t", "k_stride_h", "v_stride_t", "v_stride_h"),
    *("positions_stride", "table_stride", "slots_stride"),
)
_REST = {"positions": "*i32", "table": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32", "slots": "*i32", "eps": "fp32"}


def _spec(name: str, dim: int, rotary: int, *, interleaved: bool = False, norm: bool = False, scaling: str) -> AotSpec:
    leaves = {"k_leaf": _STORED[scaling], "v_leaf": _STORED[scaling]}
    return AotSpec(
        op="attn.rope_paged",
        name=f"{name}, {_STORED[scaling][1:]}",
        kernel=_turn_and_write,
        signature=_ROWS | leaves | _REST | dict.fromkeys(("T", "Hq", "Hk", *_STRIDES), "i32"),
        constexprs={"DV": dim, "SCALING": scaling, "NORM": norm, "BLOCK_DV": dim, **shape_of(dim, rotary, interleaved)},
        sizes={"D": dim},
        odd=("T", "Hq", "Hk", "positions_stride", "slots_stride"),
        instructions=SATFINITE if scaling == "static" else {},
    )


AOT = (
    *(_spec("D=128", 128, 128, scaling=scaling) for scaling in _STORED),
    *(_spec("D=128, norms", 128, 128, norm=True, scaling=scaling) for scaling in _STORED),
    _spec("D=64, interleaved", 64, 64, interleaved=True, scaling="none"),
    _spec("D=256, partial, norms", 256, 64, norm=True, scaling="none"),
)
