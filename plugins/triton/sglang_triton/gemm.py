"""gemm.linear on quantised weights, on codes as checkpoints have them (`sglang_core.ops.formats`). Dense ones are the device's BLAS's,
but where a row's result may not depend on its neighbours: a BLAS chooses its tiles, and so the order of a sum, by the batch.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import Codes, Fmt, PackedWeight
from sglang_triton import gemm_parts
from sglang_triton.aot_spec import AotSpec
from sglang_triton.gemm_tile import product, scale_rows
from sglang_triton.numerics import rounded, widen
from sglang_triton.packed import FORMATS, as_codes, format_constexprs, format_types, weight_sizes
from sglang_triton.quantize import AOT as QUANTIZE_AOT
from sglang_triton.quantize import quantise
from sglang_triton.rows import as_rows
from sglang_triton.tuning import choose
from sglang_triton.turns import fetch_ahead, take_turn

STREAMED = tl.constexpr(64)  # rows of a tile up to which a product waits for its weights
INVARIANT_TOKENS = 64  # the batch whose tiles serve every batch: some rows of them idle in a decode step, and prefills are not at their best


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], perhaps quantised already, w: [out, in] in a quantised format, bias: [out] -> [..., out]."""
    return _launch(x, w, bias, prod(x.shape[:-1]))


def linear_invariant(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `linear`, and dense weights too: in the same tiles whatever the batch, so that each row is summed in the same order."""
    return _launch(x, w, bias, INVARIANT_TOKENS)


def _launch(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None, num_tokens: int) -> Tensor:
    """`num_tokens`: whose tiles are taken."""
    code, scale, zero = as_codes(w)
    y = torch.empty(*x.shape[:-1], w.out_features, dtype=x.dtype, device=code.device)
    if y.numel() == 0:
        return y
    if isinstance(x, Codes):
        rows, x_scale = as_rows(x.code), as_rows(x.scale)
        rows = rows if rows.dtype == torch.int8 else rows.view(torch.uint8)
    else:
        rows, kind = as_rows(x), Fmt.parse(w.fmt).activation
        # Any pointer, where x is not quantised.
        rows, x_scale = (rows, scale) if kind == "as_is" else quantise(rows, kind)
    facts = format_constexprs(w.fmt, w.in_features)
    if parted := gemm_parts.config_of(rows, facts, num_tokens, w.out_features):
        gemm_parts.launch(rows, code, scale, zero, bias, y, bool(facts["HAS_ZERO"]), parted)
        return y
    config = choose("gemm.linear", T=num_tokens, **weight_sizes(w.fmt, w.out_features, w.in_features))
    grid = (triton.cdiv(w.out_features, config["BLOCK_N"]), triton.cdiv(rows.shape[0], config["BLOCK_T"]))
    _linear[grid](
        rows,
        x_scale,
        code,
        scale,
        zero,
        scale if bias is None else bias,
        y,
        rows.shape[0],
        w.out_features,
        rows.stride(0),
        x_scale.stride(0),
        code.stride(0),
        scale.stride(0),
        zero.stride(0),
        HAS_BIAS=bias is not None,
        **facts,
        **config,
    )
    return y


@triton.jit
def _linear(
    x,
    x_scale,
    w,
    w_scale,
    zero,
    bias,
    y,
    T,
    N,
    x_stride,
    x_scale_stride,
    w_stride,
    scale_stride,
    zero_stride,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x: [T, K] or codes of it; w: [N, K] codes, two a byte if of four bits; w_scale: a row of scales every ROWS rows; y: [T, N], dense."""
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_x, in_w = token < T, column < N
    read, row = tl.minimum(token, T - 1), tl.minimum(column, N - 1)
    FOUR_BITS: tl.constexpr = ELEMENT == "int4" or ELEMENT == "e2m1"
    if BLOCK_T <= STREAMED:
        fetch_ahead(w + row * w_stride, K // 2 if FOUR_BITS else K * w.dtype.element_ty.primitive_bitwidth // 8)
    take_turn()
    value = product(
        x + read * x_stride,
        x_scale + read * x_scale_stride,
        w + row * w_stride,
        w_scale + scale_rows(tl.program_id(0), row, ROWS, BLOCK_N) * scale_stride,
        zero + row * zero_stride,
        K,
        ELEMENT,
        GROUP,
        ACTIVATION,
        HAS_ZERO,
        NATIVE_FP8,
        PTX,
        BLOCK_T,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        value += widen(tl.load(bias + column, in_w, other=0.0))[None, :]
    at = y + token[:, None] * N + column[None, :]
    tl.store(at, rounded(value, y.dtype.element_ty), in_x[:, None] & in_w[None, :])


_INTEGERS = ("T", "N", "x_stride", "x_scale_stride", "w_stride", "scale_stride", "zero_stride")
DOTS = {"sm_80": "mma.sync", "sm_90": "mma", "sm_100": "mma", "gfx9": "v_mfma"}
STREAMING_DOTS = DOTS | {"sm_": "cp.async.cg"}  # copies ahead of the loop of 16 bytes a thread


def _spec(fmt: str, tokens: int, out: int = 4096) -> AotSpec:
    pointers = {"x_scale": "*fp32", "zero": "*u8", "bias": "*bf16", "y": "*bf16"} | format_types(fmt)
    return AotSpec(
        op="gemm.linear",
        name=f"{fmt}, T={tokens}" + (f", N={out}" if out != 4096 else ""),
        kernel=_linear,
        signature=pointers | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"HAS_BIAS": False} | format_constexprs(fmt, 4096),
        sizes={"T": tokens, **weight_sizes(fmt, out, 4096)},
        odd=("T", "x_scale_stride", "scale_stride", "zero_stride"),
        instructions=STREAMING_DOTS,
    )


AOT = (
    *(_spec(fmt, tokens) for fmt in FORMATS for tokens in (16, 64, 4096)),
    *(_spec("int4.awq.g128", tokens, out) for tokens, out in ((16, 16_384), (32, 4096), (64, 16_384))),
    *(_spec("mxfp4.g32", tokens, 16_384) for tokens in (16, 64)),
    _spec("dense", INVARIANT_TOKENS),
    *gemm_parts.AOT,
    *QUANTIZE_AOT,
)
