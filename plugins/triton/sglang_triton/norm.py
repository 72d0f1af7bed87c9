"""norm.rms, norm.rms_gated, norm.add_rms and norm.layer: a row is one tile, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import WIDE_EVERYWHERE, AotSpec
from sglang_triton.numerics import rounded, sigmoid, widen
from sglang_triton.rows import as_heads, as_rows
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., M], weight: [M] -> [..., M]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        width, rows = x.shape[-1], as_heads(x)
        count, config = rows.shape[0] * rows.shape[1], choose("norm.rms", M=width)
        _rms[(triton.cdiv(count, config["BLOCK_T"]),)](
            rows,
            weight,
            y,
            count,
            rows.shape[1],
            width,
            rows.stride(0),
            rows.stride(1),
            eps,
            BLOCK_M=triton.next_power_of_2(width),
            **config,
        )
    return y


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate: [..., M], weight: [M] -> [..., M]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        width, rows, gates = x.shape[-1], as_heads(x), as_heads(gate)
        count, config = rows.shape[0] * rows.shape[1], choose("norm.rms", M=width)
        _rms_gated[(triton.cdiv(count, config["BLOCK_T"]),)](
            rows,
            gates,
            weight,
            y,
            count,
            rows.shape[1],
            width,
            rows.stride(0),
            rows.stride(1),
            gates.stride(0),
            gates.stride(1),
            eps,
            BLOCK_M=triton.next_power_of_2(width),
            **config,
        )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, M] -> y: [T, M], residual: [T, M], a new tensor."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel():
        width, rows, old = x.shape[-1], as_rows(x), as_rows(residual)
        config = choose("norm.add_rms", M=width)
        _add_rms[(triton.cdiv(rows.shape[0], config["BLOCK_T"]),)](
            rows,
            old,
            weight,
            y,
            total,
            rows.shape[0],
            width,
            rows.stride(0),
            old.stride(0),
            eps,
            BLOCK_M=triton.next_power_of_2(width),
            **config,
        )
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x: [..., M], weight, bias: [M] -> [..., M]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        width, rows = x.shape[-1], as_rows(x)
        config = choose("norm.layer", M=width)
        _layer[(triton.cdiv(rows.shape[0], config["BLOCK_T"]),)](
            rows,
            weight,
            weight if bias is None else bias,
            y,
            rows.shape[0],
            width,
            rows.stride(0),
            eps,
            HAS_BIAS=bias is not None,
            BLOCK_M=triton.next_power_of_2(width),
            **config,
        )
    return y


@triton.jit
def _rms(x, weight, y, T, H, M, stride_t, stride_h, eps, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """x: T rows of [T / H, H, M]; y: [T, M], dense."""
    take_turn()
    row, column, inside = tile(T, M, BLOCK_T, BLOCK_M)
    at = (row // H) * stride_t + (row % H) * stride_h + column
    value = widen(tl.load(x + at, inside, other=0.0))
    value = normalised(value, M, eps) * widen(tl.load(weight + column, column < M, other=0.0))
    tl.store(y + row * M + column, rounded(value, y.dtype.element_ty), inside)


@triton.jit
def _rms_gated(
    x,
    gate,
    weight,
    y,
    T,
    H,
    M,
    stride_t,
    stride_h,
    gate_stride_t,
    gate_stride_h,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """x, gate: T rows of [T / H, H, M]; y: [T, M], dense. The norm is rounded, as between two kernels."""
    take_turn()
    row, column, inside = tile(T, M, BLOCK_T, BLOCK_M)
    value = widen(tl.load(x + (row // H) * stride_t + (row % H) * stride_h + column, inside, other=0.0))
    value = normalised(value, M, eps) * widen(tl.load(weight + column, column < M, other=0.0))
    value = widen(rounded(value, y.dtype.element_ty))
    opened = widen(tl.load(gate + (row // H) * gate_stride_t + (row % H) * gate_stride_h + column, inside, other=0.0))
    value *= opened * sigmoid(opened)
    tl.store(y + row * M + column, rounded(value, y.dtype.element_ty), inside)


@triton.jit
def _add_rms(
    x, residual, weight, y, total, T, M, stride_x, stride_r, eps, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr
):
    """x, residual: [T, M] -> total: their sum, rounded; y: the norm of what it was rounded to. Both are dense."""
    take_turn()
    row, column, inside = tile(T, M, BLOCK_T, BLOCK_M)
    value = widen(tl.load(x + row * stride_x + column, inside, other=0.0))
    value += widen(tl.load(residual + row * stride_r + column, inside, other=0.0))
    kept = rounded(value, total.dtype.element_ty)
    tl.store(total + row * M + column, kept, inside)
    value = normalised(widen(kept), M, eps) * widen(tl.load(weight + column, column < M, other=0.0))
    tl.store(y + row * M + column, rounded(value, y.dtype.element_ty), inside)


@triton.jit
def _layer(x, weight, bias, y, T, M, stride, eps, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """The mean is taken away before squares are: their difference would have no digits left far from zero."""
    take_turn()
    row, column, inside = tile(T, M, BLOCK_T, BLOCK_M)
    value = widen(tl.load(x + row * stride + column, inside, other=0.0))
    mean = tl.sum(value, axis=1, keep_dims=True) / M
    value = normalised(tl.where(inside, value - mean, 0.0), M, eps)
    value *= widen(tl.load(weight + column, column < M, other=0.0))
    if HAS_BIAS:
        value += widen(tl.load(bias + column, column < M, other=0.0))
    tl.store(y + row * M + column, rounded(value, y.dtype.element_ty), inside)


@triton.jit
def tile(T, M, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's rows int64[BLOCK_T, 1], columns int32[1, BLOCK_M], and which of them there are."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_M)[None, :]
    return row, column, (row < T) & (column < M)


@triton.jit
def normalised(x, M, eps):
    """x: float32[BLOCK_T, BLOCK_M], zeros outside -> x over the root of its mean square."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / M + eps)


WIDTHS = (128, 1024, 4096, 8192, 16384)  # one for each entry of the configs
_RMS = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "T": "i32", "H": "i32", "M": "i32", "stride_t": "i32"}
_GATED = _RMS | {"gate": "*bf16", "stride_h": "i32", "gate_stride_t": "i32", "gate_stride_h": "i32"}
_ADD = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16", "total": "*bf16", "T": "i32", "M": "i32"}
_LAYER = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "y": "*bf16", "T": "i32", "M": "i32", "stride": "i32"}


def _spec(
    op: str, kernel: object, signature: dict[str, str], width: int, *, tuned_as: str = "", **constexprs: object
) -> AotSpec:
    return AotSpec(
        op=op,
        tuned_as=tuned_as,
        name=f"M={width}",
        kernel=kernel,
        signature=signature | {"eps": "fp32"},
        constexprs={"BLOCK_M": width, **constexprs},
        sizes={"M": width},
        odd=("T", "H"),
        instructions=WIDE_EVERYWHERE,
    )


AOT = (
    *(_spec("norm.rms", _rms, _RMS | {"stride_h": "i32"}, width) for width in WIDTHS),
    _spec("norm.rms_gated", _rms_gated, _GATED, 128, tuned_as="norm.rms"),
    *(_spec("norm.add_rms", _add_rms, _ADD | {"stride_x": "i32", "stride_r": "i32"}, width) for width in WIDTHS),
    *(_spec("norm.layer", _layer, _LAYER, width, HAS_BIAS=True) for width in WIDTHS),
)
