"""quant.quantize and quant.dequantize: weights into codes and back, an expert after the other in a stack, bit for bit as the op's body.

A program finds the scale of its rows and group of columns and writes their codes in one launch. Where a whole matrix has one
scale, its largest magnitude is found before. What belongs to codes of four bits, two a byte, is in `_four`; the rest in `_eight`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight
from sglang_triton.aot_spec import AotSpec
from sglang_triton.codes import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    encode_int8,
)
from sglang_triton.numerics import nearest_integer, rounded, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

BLOCK = 128  # rows that share a scale in fp8.block128


def quantize(w: Tensor, fmt: str, *, x_scale: Tensor | None = None) -> PackedWeight:
    """w: [out, in], or a stack [X, out, in] -> canonical tensors of `fmt`, on w's device."""
    f, num_experts = Fmt.parse(fmt), w.shape[0] if w.dim() == 3 else None
    if f.is_dense:
        return PackedWeight(
            fmt, {"weight": w}, out_features=w.shape[-2], in_features=w.shape[-1], num_experts=num_experts
        )
    stack = dense_last(w if w.dim() == 3 else w[None])
    tensors = _four_bits(stack, f) if f.element in ("int4", "e2m1") else _eight_bits(stack, f)
    if w.dim() == 2:
        tensors = {name: t[0] for name, t in tensors.items()}
    if f.static:
        assert x_scale is not None, f"{fmt} needs x_scale"
        tensors["x_scale"] = x_scale
    return PackedWeight(fmt, tensors, out_features=w.shape[-2], in_features=w.shape[-1], num_experts=num_experts)


def dequantize(w: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """A canonical weight -> [out, in] ([X, out, in]) in `dtype`."""
    f = Fmt.parse(w.fmt)
    assert w.layout == "canonical", f"{w.layout} is a kernel's own layout: unpack it first"
    code = w["weight"].contiguous()
    if f.is_dense:
        return code.to(dtype)
    shape = (*code.shape[:-1], w.in_features)
    out = torch.empty(shape, dtype=dtype, device=code.device)
    config = choose("quant.dequantize")
    experts = 1 if code.dim() == 2 else code.shape[0]
    grid = (experts * triton.cdiv(w.out_features, config["BLOCK_R"]), triton.cdiv(w.in_features, config["BLOCK_C"]))
    code = code.view(torch.uint8) if f.element == "fp8" else code
    scale = w["scale"].contiguous()
    _dequantise[grid](
        code,
        scale.view(torch.uint8) if f.element == "e2m1" else scale,
        w["zero"].contiguous() if f.has_zero else code,
        w["group"].contiguous() if f.act_order else code,
        w["global_scale"].contiguous() if _two_scales(f) else code,
        out,
        w.out_features,
        w.in_features,
        **_facts(f, w.in_features),
        HAS_ZERO=f.has_zero,
        ACT_ORDER=f.act_order,
        **config,
    )
    return out


def _two_scales(f: Fmt) -> bool:
    return f.element == "e2m1" and f.group == 16


def _facts(f: Fmt, columns: int) -> dict[str, object]:
    """How codes and scales lie: ROWS times GROUP elements share a scale; all of a row where GROUP is their number."""
    group = columns if f.group in (None, -1) else f.group
    rows = BLOCK if f.element == "fp8" and f.group is not None else 1
    return {"ELEMENT": f.element, "GROUP": group, "ROWS": rows, "TWO_SCALES": _two_scales(f)}


def _largest(w: Tensor) -> Tensor:
    """w: [X, out, in] -> float32[X], of each matrix."""
    return torch.linalg.vector_norm(w, torch.inf, dim=(-2, -1)).float()


def _eight_bits(w: Tensor, f: Fmt) -> dict[str, Tensor]:
    experts, rows, columns = w.shape
    facts = _facts(f, columns)
    group, shared = int(facts["GROUP"]), int(facts["ROWS"])  # type: ignore[call-overload]
    groups, config = triton.cdiv(columns, group), dict(choose("quant.quantize", ROWS=shared))
    code = torch.empty(w.shape, dtype=torch.int8 if f.element == "int8" else torch.float8_e4m3fn, device=w.device)
    scale = torch.empty(experts, triton.cdiv(rows, shared), groups, dtype=torch.float32, device=w.device)
    config["BLOCK_C"] = min(config["BLOCK_C"], triton.next_power_of_2(group))
    _eight[(experts * triton.cdiv(rows, config["BLOCK_R"]), groups)](
        w,
        _largest(w) if f.one_scale else w,
        code if f.element == "int8" else code.view(torch.uint8),
        scale,
        rows,
        columns,
        w.stride(0),
        w.stride(1),
        ELEMENT=f.element,
        GROUP=group,
        ROWS=shared,
        ONE_SCALE=f.one_scale,
        **config,
    )
    return {"weight": code, "scale": scale if f.group is not None else scale[..., 0]}


def _four_bits(w: Tensor, f: Fmt) -> dict[str, Tensor]:
    experts, rows, columns = w.shape
    facts = _facts(f, columns)
    group = int(facts["GROUP"])  # type: ignore[call-overload]
    groups, config = triton.cdiv(columns, group), dict(choose("quant.quantize", ROWS=1))
    code = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=w.device)
    of = torch.float32 if f.element == "int4" else torch.float8_e4m3fn if _two_scales(f) else torch.uint8
    made = {"weight": code, "scale": torch.empty(experts, rows, groups, dtype=of, device=w.device)}
    if f.has_zero:
        made["zero"] = torch.empty(experts, rows, groups, dtype=torch.uint8, device=w.device)
    if _two_scales(f):
        made["global_scale"] = torch.empty(experts, rows, dtype=torch.float32, device=w.device)
    config["BLOCK_C"] = min(config["BLOCK_C"], triton.next_power_of_2(group))
    _four[(experts * triton.cdiv(rows, config["BLOCK_R"]), groups)](
        w,
        _largest(w) if _two_scales(f) else w,
        code,
        made["scale"] if f.element == "int4" else made["scale"].view(torch.uint8),
        made.get("zero", code),
        made.get("global_scale", code),
        rows,
        columns,
        w.stride(0),
        w.stride(1),
        ELEMENT=f.element,
        GROUP=group,
        TWO_SCALES=_two_scales(f),
        HAS_ZERO=f.has_zero,
        **config,
    )
    if f.act_order:
        own = torch.arange(columns, dtype=torch.int32, device=w.device) // group
        made["group"] = own.expand(experts, columns).contiguous()
    return made


@triton.jit
def _eight(
    w,
    largest,
    code,
    scale,
    N,
    K,
    stride_x,
    stride_n,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R rows of a matrix [N, K], a group of columns, which is looked at twice. With ROWS > 1 that is BLOCK_R,
    and the tile has one scale: float32[X, ceil(N / ROWS), groups]."""
    take_turn()
    top: tl.constexpr = 127.0 if ELEMENT == "int8" else 448.0
    blocks = tl.cdiv(N, BLOCK_R)
    expert, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    source = w + expert * stride_x + row[:, None] * stride_n
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, K)
    if ONE_SCALE:
        most = tl.zeros([BLOCK_R], tl.float32) + tl.load(largest + expert)
    else:
        most = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, GROUP, BLOCK_C):
            column = (first + start + tl.arange(0, BLOCK_C))[None, :]
            value = widen(tl.load(source + column, (row < N)[:, None] & (column < last), other=0.0))
            most = tl.maximum(most, tl.max(tl.abs(value), axis=1))
        if ROWS > 1:
            most = tl.zeros([BLOCK_R], tl.float32) + tl.max(most, axis=0)
    step = short_scale(most, top)
    for start in range(0, GROUP, BLOCK_C):
        column = (first + start + tl.arange(0, BLOCK_C))[None, :]
        inside = (row < N)[:, None] & (column < last)
        value = tl.div_rn(widen(tl.load(source + column, inside, other=0.0)), step[:, None])
        made = encode_int8(value) if ELEMENT == "int8" else encode_e4m3(value)
        tl.store(code + (expert * N + row)[:, None] * K + column, made, inside)
    at = expert * tl.cdiv(N, ROWS) + row // ROWS
    tl.store(scale + at * tl.num_programs(1) + tl.program_id(1), step, (row < N) & (row % ROWS == 0))


@triton.jit
def _four(
    w,
    largest,
    code,
    scale,
    zero,
    global_scale,
    N,
    K,
    stride_x,
    stride_n,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    TWO_SCALES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R rows of a matrix [N, K], a group of columns, which is looked at twice. Even columns are low nibbles."""
    take_turn()
    blocks = tl.cdiv(N, BLOCK_R)
    expert, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    source = w + expert * stride_x + row[:, None] * stride_n
    first = tl.program_id(1) * GROUP
    last = tl.minimum(first + GROUP, K)
    low, high = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, GROUP, BLOCK_C):
        column = (first + start + tl.arange(0, BLOCK_C))[None, :]
        value = widen(tl.load(source + column, (row < N)[:, None] & (column < last), other=0.0))
        low, high = tl.minimum(low, tl.min(value, axis=1)), tl.maximum(high, tl.max(value, axis=1))
    most = tl.maximum(-low, high)
    at = (expert * N + row) * tl.num_programs(1) + tl.program_id(1)
    offset = tl.full([BLOCK_R], 8.0, tl.float32)
    if ELEMENT == "int4":
        if HAS_ZERO:
            step = short_scale(high - low, 15.0)
            offset = tl.minimum(nearest_integer(tl.div_rn(-low, step)), 15.0)
            tl.store(zero + at, offset.to(tl.uint8), row < N)
        else:
            step = short_scale(most, 7.0, BITS=8)
        tl.store(scale + at, step, row < N)
    elif TWO_SCALES:
        total = short_scale(tl.zeros([BLOCK_R], tl.float32) + tl.load(largest + expert), 2688.0)  # of e2m1 times e4m3
        group_code = encode_e4m3(tl.div_rn(tl.div_rn(most, 6.0), total))
        tl.store(scale + at, group_code, row < N)
        tl.store(global_scale + expert * N + row, total, row < tl.where(tl.program_id(1) == 0, N, 0))
        step = decode_e4m3(group_code) * total
    else:
        group_code = encode_e8m0(most)
        tl.store(scale + at, group_code, row < N)
        step = decode_e8m0(group_code)
    for start in range(0, GROUP, BLOCK_C):
        pair = first // 2 + start // 2 + tl.arange(0, BLOCK_C // 2)[None, :]
        inside = (row < N)[:, None] & (2 * pair < last)
        even = four_bit_code(tl.load(source + 2 * pair, inside, other=0.0), step[:, None], offset[:, None], ELEMENT)
        odd = four_bit_code(tl.load(source + 2 * pair + 1, inside, other=0.0), step[:, None], offset[:, None], ELEMENT)
        tl.store(code + (expert * N + row)[:, None] * (K // 2) + pair, (even | (odd << 4)).to(tl.uint8), inside)


@triton.jit
def four_bit_code(value, step, offset, ELEMENT: tl.constexpr):
    """value: [m, n] of any float dtype, step, offset: float32[m, 1] -> int32[m, n] in 0..15; all 0 where e2m1's step is 0."""
    scaled = tl.div_rn(widen(value), tl.where(step == 0.0, 1.0, step))
    if ELEMENT == "int4":
        code = tl.minimum(tl.maximum(nearest_integer(scaled) + offset, 0.0), 15.0).to(tl.int32)
    else:
        code = tl.where(step == 0.0, 0, encode_e2m1(scaled))
    return code


@triton.jit
def short_scale(most, top, BITS: tl.constexpr = 16):
    """most: float32 -> most / top with BITS significant bits, 1 where that is 0."""
    step = tl.div_rn(most, most * 0.0 + top)
    bits = tl.where(step == 0.0, 1.0, step).to(tl.uint32, bitcast=True)
    return ((bits + (1 << (23 - BITS))) >> (24 - BITS) << (24 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _dequantise(
    code,
    scale,
    zero,
    group,
    global_scale,
    out,
    N,
    K,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TWO_SCALES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R rows and BLOCK_C columns of a matrix [N, K]."""
    take_turn()
    blocks = tl.cdiv(N, BLOCK_R)
    expert, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row = (block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (row < N) & (column < K)
    whole = expert * N + row
    part = column // GROUP
    if ACT_ORDER:
        part = tl.load(group + expert * K + column, column < K, other=0)
    at = (expert * tl.cdiv(N, ROWS) + row // ROWS) * tl.cdiv(K, GROUP) + part
    step = tl.load(scale + at, inside, other=0)
    if ELEMENT == "int4" or ELEMENT == "e2m1":
        byte = tl.load(code + whole * (K // 2) + column // 2, inside, other=0).to(tl.int32)
        four = (byte >> (4 * (column % 2))) & 15
        if ELEMENT == "e2m1":
            value = decode_e2m1(four)
            if TWO_SCALES:
                step = decode_e4m3(step) * tl.load(global_scale + whole, row < N, other=0.0)
            else:
                step = decode_e8m0(step)
        elif HAS_ZERO:
            value = (four - tl.load(zero + at, inside, other=0).to(tl.int32)).to(tl.float32)
        else:
            value = (four - 8).to(tl.float32)
    else:
        eight = tl.load(code + whole * K + column, inside, other=0)
        value = decode_e4m3(eight) if ELEMENT == "fp8" else eight.to(tl.float32)
    tl.store(out + whole * K + column, rounded(value * step, out.dtype.element_ty), inside)


_SIZES = dict.fromkeys(("N", "K", "stride_x", "stride_n"), "i32")
_KINDS = (
    "fp8.block128",
    "fp8.tensor",
    "int8.token_channel",
    "int4.awq.g128",
    "int4.pack.g32",
    "mxfp4.g32",
    "nvfp4.g16",
)


def _spec(name: str, *, back: bool = False) -> AotSpec:
    f = Fmt.parse(name)
    four, facts = f.element in ("int4", "e2m1"), _facts(f, 4096)
    code, scale = "*i8" if f.element == "int8" else "*u8", "*u8" if f.element == "e2m1" else "*fp32"
    types = {"w": "*bf16", "out": "*bf16", "code": code, "scale": scale, "largest": "*fp32", "global_scale": "*fp32"}
    facts |= {"HAS_ZERO": f.has_zero, "ACT_ORDER": f.act_order, "ONE_SCALE": f.one_scale}
    group = int(facts["GROUP"])  # type: ignore[call-overload]
    return AotSpec(
        op="quant.dequantize" if back else "quant.quantize",
        name=name,
        kernel=_dequantise if back else _four if four else _eight,
        signature=types | {"zero": "*u8", "group": "*i32"} | _SIZES,
        constexprs=facts if back else facts | {"BLOCK_C": min(group, 128)},
        sizes={} if back else {"ROWS": int(facts["ROWS"])},  # type: ignore[call-overload]
    )


AOT = (*(_spec(name) for name in _KINDS), *(_spec(name, back=True) for name in _KINDS))
