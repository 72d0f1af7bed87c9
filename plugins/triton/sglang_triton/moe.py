"""moe.fused and gemm.grouped: rows in the order of their experts (`grouping`), multiplied in tiles that each belong to one expert.

How many tiles an expert has is known on the device alone. A grid has as many programs as there can be tiles; each finds its
expert and its rows from the sizes of the groups, and those that are too many end at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import ExpertSpec, Fmt, PackedWeight
from sglang_triton.activation import gated_rows
from sglang_triton.aot_spec import WIDE, AotSpec
from sglang_triton.gemm import STREAMING_DOTS
from sglang_triton.gemm_tile import product, scale_rows
from sglang_triton.grouping import by_group
from sglang_triton.numerics import rounded, widen
from sglang_triton.packed import FORMATS, as_codes, format_constexprs, format_types, weight_sizes
from sglang_triton.quantize import quantise
from sglang_triton.rows import as_rows
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

INVARIANT_ROWS = 1024  # whose tiles serve every batch where a row may not depend on its neighbours: of 16 rows, which prefills are not at their best in


def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [S, in], w: [X, out, in], group_sizes: int32[X], bias: [X, out] -> [S, out]; zeros for rows past the sum of the sizes."""
    return by_expert(x, w, group_sizes, bias, x.new_zeros(x.shape[0], w.out_features))


def grouped_invariant(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `grouped`, in the same tiles whatever the batch, so that each row is summed in the same order."""
    return by_expert_invariant(x, w, group_sizes, bias, x.new_zeros(x.shape[0], w.out_features))


def fused(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    act: ExpertSpec,
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    expert_map: Tensor | None = None,
    multiply: Callable[..., Tensor] | None = None,
) -> Tensor:
    """x: [T, M], w13: [X, 2F, M], w2: [X, M, F], weights: float32[T, K], ids: int32[T, K] -> [T, M]. `multiply`: as `by_expert`, which it is by default."""
    multiply = multiply or by_expert
    (num_tokens, top_k), device = ids.shape, x.device
    num_experts = w13.num_experts or 0
    order, sizes = by_group(ids.flatten(), num_experts, expert_map)
    count = num_tokens * top_k
    source, share = order, top_k
    if act.weight_on_input:
        x = (x.float()[:, None] * weights[..., None]).to(x.dtype).flatten(0, 1)
        share = 1
    # Rows of what is remote are never written, and never read: whatever they hold stays theirs.
    h = torch.empty(count, w13.out_features, dtype=x.dtype, device=device)
    h = gated_rows(multiply(x, w13, sizes, bias13, h, source=source, share=share), act)
    make = torch.empty if expert_map is None else torch.zeros
    y = make(count, w2.out_features, dtype=x.dtype, device=device)
    multiply(h, w2, sizes, bias2, y, target=order)
    return combined(y, weights, weighted=not act.weight_on_input)


def fused_invariant(*args: Any, **more: Any) -> Tensor:
    """As `fused`, in the same tiles whatever the batch."""
    return fused(*args, **more, multiply=by_expert_invariant)


def by_expert(
    x: Tensor,
    w: PackedWeight,
    sizes: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    source: Tensor | None = None,
    share: int = 1,
    target: Tensor | None = None,
    tiles_for: int | None = None,
) -> Tensor:
    """y: [S, out]. Sorted row i is row source[i] // share of x (or i), and is written to row target[i] of y (or i). `tiles_for`: not S, where given."""
    if y.numel() == 0:
        return y
    rows, kind, num_experts = as_rows(x), Fmt.parse(w.fmt).activation, w.num_experts or 0
    code, scale, zero = as_codes(w)
    rows, x_scale = (rows, scale) if kind == "as_is" else quantise(rows, kind)
    count = y.shape[0]
    config = choose(
        "moe.fused", S=tiles_for or count, X=num_experts, **weight_sizes(w.fmt, w.out_features, w.in_features)
    )
    tiles = triton.cdiv(count + min(count, num_experts) * (config["BLOCK_T"] - 1), config["BLOCK_T"])
    _grouped[(tiles, triton.cdiv(w.out_features, config["BLOCK_N"]))](
        rows,
        x_scale,
        code,
        scale,
        zero,
        scale if bias is None else bias,
        sizes,
        sizes if source is None else source,
        sizes if target is None else target,
        y,
        w.out_features,
        rows.stride(0),
        x_scale.stride(0) if kind != "as_is" else 0,
        code.stride(0),
        code.stride(1),
        scale.stride(0),
        scale.stride(1),
        zero.stride(0),
        zero.stride(1),
        0 if bias is None else bias.stride(0),
        X=num_experts,
        SHARE=share,
        BLOCK_X=triton.next_power_of_2(num_experts),
        HAS_SOURCE=source is not None,
        HAS_TARGET=target is not None,
        HAS_BIAS=bias is not None,
        **format_constexprs(w.fmt, w.in_features),
        **config,
    )
    return y


by_expert_invariant = partial(by_expert, tiles_for=INVARIANT_ROWS)


def combined(y: Tensor, weights: Tensor, *, weighted: bool) -> Tensor:
    """y: [T * K, M], weights: float32[T, K] -> [T, M]: the sum over K, in float32."""
    (num_tokens, top_k), width = weights.shape, y.shape[1]
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    if out.numel():
        config = choose("moe.combine", M=width)
        grid = (triton.cdiv(num_tokens, config["BLOCK_T"]), triton.cdiv(width, config["BLOCK_M"]))
        _combine[grid](y, weights.contiguous(), out, num_tokens, width, K=top_k, WEIGHTED=weighted, **config)
    return out


@triton.jit
def _grouped(
    x,
    x_scale,
    w,
    w_scale,
    zero,
    bias,
    sizes,
    source,
    target,
    y,
    N,
    x_stride,
    x_scale_stride,
    w_stride_x,
    w_stride_n,
    scale_stride_x,
    scale_stride_n,
    zero_stride_x,
    zero_stride_n,
    bias_stride,
    X: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_T sorted rows of one expert by BLOCK_N of its columns. w: [X, N, K] codes."""
    take_turn()
    each = tl.arange(0, BLOCK_X)
    size = tl.load(sizes + each, each < X, other=0)
    tiles = (size + BLOCK_T - 1) // BLOCK_T
    last_tile = tl.cumsum(tiles, axis=0)
    expert = tl.sum((last_tile <= tl.program_id(0)).to(tl.int32), axis=0)
    if expert < X:
        mine = each == expert
        begin = tl.sum(tl.where(each < expert, size, 0), axis=0)
        end = begin + tl.sum(tl.where(mine, size, 0), axis=0)
        tile = tl.program_id(0) - tl.sum(tl.where(mine, last_tile - tiles, 0), axis=0)
        row = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        in_x = row < end
        row = tl.minimum(row, end - 1)
        read, written = row, row
        if HAS_SOURCE:
            read = tl.load(source + row) // SHARE
        if HAS_TARGET:
            written = tl.load(target + row)
        read, written, matrix = read.to(tl.int64), written.to(tl.int64), expert.to(tl.int64)
        column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_w = column < N
        row_w = tl.minimum(column, N - 1)
        scale_row = scale_rows(tl.program_id(1), row_w, ROWS, BLOCK_N)
        value = product(
            x + read * x_stride,
            x_scale + read * x_scale_stride,
            w + matrix * w_stride_x + row_w * w_stride_n,
            w_scale + matrix * scale_stride_x + scale_row * scale_stride_n,
            zero + matrix * zero_stride_x + row_w * zero_stride_n,
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
            value += widen(tl.load(bias + matrix * bias_stride + column, in_w, other=0.0))[None, :]
        at = y + written[:, None] * N + column[None, :]
        tl.store(at, rounded(value, y.dtype.element_ty), in_x[:, None] & in_w[None, :])


@triton.jit
def _combine(
    y, weights, out, T, M, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr
):
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    inside = (token < T) & (column < M)
    total = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for k in tl.static_range(K):
        value = widen(tl.load(y + (token * K + k) * M + column, inside, other=0.0))
        if WEIGHTED:
            value *= tl.load(weights + token * K + k, token < T, other=0.0)
        total += value
    tl.store(out + token * M + column, rounded(total, out.dtype.element_ty), inside)


_STRIDES = (
    *("x_stride", "x_scale_stride", "w_stride_x", "w_stride_n", "scale_stride_x", "scale_stride_n"),
    *("zero_stride_x", "zero_stride_n", "bias_stride"),
)


def _spec(fmt: str, rows: int, out: int = 2048, inner: int = 2048) -> AotSpec:
    pointers = {"x_scale": "*fp32", "zero": "*u8", "bias": "*bf16", "y": "*bf16"} | format_types(fmt)
    return AotSpec(
        op="moe.fused",
        name=f"{fmt}, S={rows}" + (f", N={out}" if out != 2048 else "") + (f", K={inner}" if inner != 2048 else ""),
        kernel=_grouped,
        signature=pointers
        | {"sizes": "*i32", "source": "*i32", "target": "*i32"}
        | dict.fromkeys(("N", *_STRIDES), "i32"),
        constexprs={
            "X": 128,
            "SHARE": 8,
            "BLOCK_X": 128,
            "HAS_SOURCE": True,
            "HAS_TARGET": False,
            "HAS_BIAS": False,
            **format_constexprs(fmt, inner),
        },
        sizes={"S": rows, "X": 128, **weight_sizes(fmt, out, inner)},
        odd=("x_scale_stride", "scale_stride_n", "zero_stride_n"),
        instructions=STREAMING_DOTS,
    )


AOT = (
    *(_spec(fmt, rows) for fmt in ("dense", *FORMATS) for rows in (512, 32_768)),
    *(_spec("dense", rows, out) for rows, out in ((8192, 2048), (32_768, 768))),
    _spec("mxfp4.g32", 8192),
    _spec("mxfp4.g32", 512, 5760, 2880),  # GPT-OSS's, whose rows are no whole number of steps
    replace(_spec("dense", 512), op="gemm.grouped", tuned_as="moe.fused"),
    AotSpec(
        op="moe.fused",
        tuned_as="moe.combine",
        name="combine",
        kernel=_combine,
        signature={"y": "*bf16", "weights": "*fp32", "out": "*bf16", "T": "i32", "M": "i32"},
        constexprs={"K": 8, "WEIGHTED": True},
        sizes={"M": 2048},
        odd=("T",),
        instructions=WIDE,
    ),
)
