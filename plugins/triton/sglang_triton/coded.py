"""norm.add_rms_quant and act.gated_quant: what linear layers multiply as codes is quantised while it is in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import CodeKind, Codes, GateKind
from sglang_triton.activation import activate
from sglang_triton.aot_spec import SATFINITE, AotSpec
from sglang_triton.norm import WIDTHS, normalised, tile
from sglang_triton.numerics import rounded, widen
from sglang_triton.quantize import BLOCK, coded, empty_codes
from sglang_triton.rows import as_rows
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: CodeKind) -> tuple[Codes, Tensor]:
    """x, residual: [T, M] -> codes of y: [T, M], and the sum, a new tensor."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    code, scale = empty_codes(*x.shape, kind, x.device)
    if total.numel():
        width, rows, old = x.shape[-1], as_rows(x), as_rows(residual)
        config = choose("norm.add_rms_quant", M=width)
        _add_rms_quant[(triton.cdiv(rows.shape[0], config["BLOCK_T"]),)](
            rows, old, weight, code, scale, total, rows.shape[0], width, rows.stride(0), old.stride(0), eps,
            KIND=kind, GROUP=BLOCK, BLOCK_M=max(BLOCK, triton.next_power_of_2(width)), **config,
        )  # fmt: skip
    return as_codes(code, scale, x.dtype), total


def gated_quant(x: Tensor, kind: GateKind, codes: CodeKind) -> Codes:
    """x: [T, 2F], gate then up -> codes of [T, F]."""
    width = x.shape[-1] // 2
    code, scale = empty_codes(x.shape[0], width, codes, x.device)
    if code.numel():
        rows, group = as_rows(x), BLOCK if codes == "fp8_block" else width
        config = choose("quant.activations", K=group)
        _gated_quant[(triton.cdiv(rows.shape[0], config["BLOCK_T"]), scale.shape[1])](
            rows, code, scale, rows.shape[0], width, rows.stride(0),
            ACT=kind, KIND=codes, GROUP=group, BLOCK_F=triton.next_power_of_2(group), **config,
        )  # fmt: skip
    return as_codes(code, scale, x.dtype)


def as_codes(code: Tensor, scale: Tensor, dtype: torch.dtype) -> Codes:
    return Codes(code if code.dtype == torch.int8 else code.view(torch.float8_e4m3fn), scale, dtype)


@triton.jit
def _add_rms_quant(
    x,
    residual,
    weight,
    code,
    scale,
    total,
    T,
    M,
    stride_x,
    stride_r,
    eps,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SATFINITE: tl.constexpr,
):
    """As norm's `_add_rms`, and then codes of what y is rounded to. Scales: [T, 1], or [T, ceil(M / GROUP)] of "fp8_block"."""
    take_turn()
    row, column, inside = tile(T, M, BLOCK_T, BLOCK_M)
    value = widen(tl.load(x + row * stride_x + column, inside, other=0.0))
    value += widen(tl.load(residual + row * stride_r + column, inside, other=0.0))
    kept = rounded(value, total.dtype.element_ty)
    tl.store(total + row * M + column, kept, inside)
    value = normalised(widen(kept), M, eps) * widen(tl.load(weight + column, column < M, other=0.0))
    value = widen(rounded(value, total.dtype.element_ty))
    if KIND == "fp8_block":
        made, step = coded(tl.reshape(value, [BLOCK_T, BLOCK_M // GROUP, GROUP]), KIND, SATFINITE)
        made = tl.reshape(made, [BLOCK_T, BLOCK_M])
        groups = tl.cdiv(M, GROUP)
        group = tl.arange(0, BLOCK_M // GROUP)[None, :]
        step = tl.reshape(step, [BLOCK_T, BLOCK_M // GROUP])
        tl.store(scale + row * groups + group, step, (row < T) & (group < groups))
    else:
        made, step = coded(value, KIND, SATFINITE)
        tl.store(scale + row, step, row < T)
    tl.store(code + row * M + column, made, inside)


@triton.jit
def _gated_quant(
    x,
    code,
    scale,
    T,
    F,
    stride,
    ACT: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SATFINITE: tl.constexpr,
):
    """x: [T, 2F], rows `stride` apart. One program: the columns that share a scale, of BLOCK_T rows."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    inner = tl.arange(0, BLOCK_F)[None, :]
    column = tl.program_id(1) * GROUP + inner
    inside = (row < T) & (column < F) & (inner < GROUP)
    gate = widen(tl.load(x + row * stride + column, inside, other=0.0))
    up = widen(tl.load(x + row * stride + F + column, inside, other=0.0))
    made, step = coded(widen(rounded(activate(gate, ACT) * up, x.dtype.element_ty)), KIND, SATFINITE)
    tl.store(code + row * F + column, made, inside)
    tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), step, row < T)


_KINDS = {"fp8": "*u8", "fp8_block": "*u8", "int8": "*i8"}
_NORM = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "total": "*bf16", "scale": "*fp32", "eps": "fp32"}
_GATED = {"x": "*bf16", "scale": "*fp32", "T": "i32", "F": "i32", "stride": "i32"}
AOT = (
    *(
        AotSpec(
            op="norm.add_rms_quant",
            name=f"{kind}, M={width}",
            kernel=_add_rms_quant,
            signature=_NORM | dict.fromkeys(("T", "M", "stride_x", "stride_r"), "i32") | {"code": code},
            constexprs={"KIND": kind, "GROUP": BLOCK, "BLOCK_M": width},
            sizes={"M": width},
            odd=("T",),
            # At the largest width sm_90 does without: ptxas takes 93 registers with it, so one program a processor in place of two.
            instructions={} if kind == "int8" or width == WIDTHS[-1] else SATFINITE,
        )
        for kind, code in _KINDS.items()
        for width in WIDTHS[1:]
    ),
    *(
        AotSpec(
            op="act.gated_quant",
            tuned_as="quant.activations",
            name=f"{kind}, F={width}",
            kernel=_gated_quant,
            signature=_GATED | {"code": code},
            constexprs={"ACT": "silu", "KIND": kind, "GROUP": group, "BLOCK_F": triton.next_power_of_2(group)},
            sizes={"K": group},
            odd=("T",),
            instructions={} if kind == "int8" else SATFINITE,
        )
        for kind, code in _KINDS.items()
        for width, group in ((4096, BLOCK if kind == "fp8_block" else 4096),)
    ),
)
