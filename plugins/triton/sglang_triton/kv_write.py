"""kv.write and kv.write_mla: new tokens into their slots, in whatever the pool stores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api import Pool
from sglang_triton.aot_spec import SATFINITE, AotSpec
from sglang_triton.codes import encode_e4m3, encode_int8
from sglang_triton.numerics import quotient, rounded, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv], slot_mapping: int32[T]. Slots repeat only in page 0, which nobody reads."""
    num_tokens, heads, dim = k.shape
    if num_tokens == 0:
        return
    k, v = dense_last(k), dense_last(v)
    k_leaf, v_leaf, *scales = pool.layer_leaves(layer)
    scaling = pool.spec.scaling
    if scaling == "static":
        scales = [pool.k_scale(layer), pool.v_scale(layer)]
        k_leaf, v_leaf = k_leaf.view(torch.uint8), v_leaf.view(torch.uint8)
    k_scale, v_scale = scales or (slot_mapping, slot_mapping)  # any pointer: it is not looked at
    config = choose("kv.write", D=max(dim, v.shape[2]))
    _write[(triton.cdiv(num_tokens, config["BLOCK_T"]), heads)](
        k,
        v,
        k_leaf,
        v_leaf,
        k_scale,
        v_scale,
        slot_mapping,
        num_tokens,
        heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        slot_mapping.stride(0),
        D=dim,
        DV=v.shape[2],
        SCALING=scaling,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_DV=triton.next_power_of_2(v.shape[2]),
        **config,
    )


def kv_write_mla(c_kv: Tensor, k_pe: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """c_kv: [T, rank], k_pe: [T, rope_dim], slot_mapping: int32[T]."""
    kv_write(c_kv[:, None], k_pe[:, None], pool, layer, slot_mapping)


@triton.jit
def _write(
    k,
    v,
    k_leaf,
    v_leaf,
    k_scale,
    v_scale,
    slots,
    T,
    H,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    slots_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SATFINITE: tl.constexpr,
):
    """One program: BLOCK_T tokens of one head. Leaves are dense, [slots, H, D]."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token * slots_stride, token < T, other=0).to(tl.int64)
    target = slot * H + head
    source = k + token * k_stride_t + head * k_stride_h
    store_row(source, k_leaf + target * D, k_scale, target, head, token < T, D, SCALING, SATFINITE, BLOCK_D)
    source = v + token * v_stride_t + head * v_stride_h
    store_row(source, v_leaf + target * DV, v_scale, target, head, token < T, DV, SCALING, SATFINITE, BLOCK_DV)


@triton.jit
def store_row(
    source,
    target,
    scale,
    scale_at,
    head,
    there,
    D: tl.constexpr,
    SCALING: tl.constexpr,
    SATFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """source, target: pointers [BLOCK_T, 1] to rows of D elements. `scale`: float32[H], or one a row, written at `scale_at`."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = there & (column < D)
    x = widen(tl.load(source + column, inside, other=0.0))
    step = 1.0
    if SCALING == "static":
        step = tl.load(scale + head)
    elif SCALING == "dynamic":
        step = tl.div_rn(tl.max(tl.abs(x), axis=1, keep_dims=True), 127.0)
        tl.store(scale + scale_at, step, there)
    tl.store(target + column, encoded(x, step, target.dtype.element_ty, SCALING, SATFINITE), inside)


@triton.jit
def encoded(x, step, dtype: tl.constexpr, SCALING: tl.constexpr, SATFINITE: tl.constexpr):
    """x: float32 -> what a pool of such a dtype holds of it. step: the scale of its codes, if it has any."""
    if SCALING == "static":
        code = encode_e4m3(quotient(x, step), SATFINITE)
    elif SCALING == "dynamic":
        code = encode_int8(quotient(x, tl.where(step == 0.0, 1.0, step)))
    else:
        code = rounded(x, dtype)
    return code


_INTEGERS = ("T", "H", "k_stride_t", "k_stride_h", "v_stride_t", "v_stride_h", "slots_stride")


def _spec(op: str, dim: int, v_dim: int, scaling: str, leaf: str) -> AotSpec:
    pointers = {"k": "*bf16", "v": "*bf16", "k_leaf": leaf, "v_leaf": leaf, "k_scale": "*fp32", "v_scale": "*fp32"}
    return AotSpec(
        op=op,
        tuned_as="kv.write",
        name=f"D={dim}, {leaf[1:]}",
        kernel=_write,
        signature=pointers | {"slots": "*i32"} | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"D": dim, "DV": v_dim, "SCALING": scaling, "BLOCK_D": dim, "BLOCK_DV": v_dim},
        sizes={"D": max(dim, v_dim)},
        odd=("T", "H", "slots_stride"),
        instructions=SATFINITE if scaling == "static" else {},
    )


AOT = tuple(
    _spec(op, dim, v_dim, scaling, leaf)
    for op, dim, v_dim in (("kv.write", 128, 128), ("kv.write_mla", 512, 64))
    for scaling, leaf in (("none", "*bf16"), ("static", "*u8"), ("dynamic", "*i8"))
)
