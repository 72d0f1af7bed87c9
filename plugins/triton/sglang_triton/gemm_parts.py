"""gemm.linear of few rows on int4 weights of few outputs: a program takes several parts of K side by side, and adds them up at its end.

Such a product has one or two programs a processor, by its outputs. Of four warps each, they are too few to have something to do while others wait, and
what a warp does for the rows of x, which are many bytes beside those of four bits, it does for eight columns. Here each warp has a part of K to itself
and all columns: no two do the same, and there are more of them. Parts are a dim of the tile: one launch, one order of sums, nothing to set to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.nibbles import numbers_of
from sglang_triton.numerics import dot, rounded, widen
from sglang_triton.packed import BLOCK, FEW
from sglang_triton.tuning import Config, choose
from sglang_triton.turns import fetch_ahead, take_turn


def config_of(x: Tensor, facts: dict[str, object], num_tokens: int, out_features: int) -> Config | None:
    """None where it is not for such a product. x: [T, K]; `facts`: `packed.format_constexprs` of the weight."""
    # Tiles of 32 rows would spill: a warp has all 64 columns.
    if num_tokens > FEW or x.element_size() != 2 or facts["ELEMENT"] != "int4" or facts["GROUP"] != BLOCK:
        return None
    config = choose("gemm.parts", N=out_features, K=x.shape[1])
    return config if config["PARTS"] > 1 and x.shape[1] % (BLOCK * config["PARTS"]) == 0 else None


def launch(
    x: Tensor, code: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, y: Tensor, has_zero: bool, config: Config
) -> None:
    """x: [T, K], code: uint8[N, K / 2], scale, zero: [N, K / 128] -> y: [.., N], written."""
    out_features = code.shape[0]
    _parts[(triton.cdiv(out_features, config["BLOCK_N"]),)](
        x, code, scale, zero, scale if bias is None else bias, y, x.shape[0], out_features,
        x.stride(0), code.stride(0), scale.stride(0), zero.stride(0),
        K=x.shape[1], HAS_ZERO=has_zero, HAS_BIAS=bias is not None, BLOCK_T=FEW, BLOCK_K=BLOCK, **config,
    )  # fmt: skip


@triton.jit
def _parts(
    x,
    w,
    w_scale,
    zero,
    bias,
    y,
    T,
    N,
    x_stride,
    w_stride,
    scale_stride,
    zero_stride,
    K: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x: [T, K], T up to BLOCK_T; w: [N, K / 2], two codes a byte, the low one first; w_scale, zero: [N, K / BLOCK_K]; y: [T, N], dense.

    Tiles are [PARTS, ...], a step is a group of each part. Of rows and columns that there are not, others are read and nothing is written.
    """
    token = tl.arange(0, BLOCK_T).to(tl.int64)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row = tl.minimum(column, N - 1)
    part = tl.arange(0, PARTS)[:, None, None] * (K // PARTS)
    group = tl.arange(0, PARTS)[:, None] * (K // PARTS // BLOCK_K)
    x_at = x + (tl.minimum(token, T - 1) * x_stride)[None, :, None] + part + tl.arange(0, BLOCK_K)[None, None, :]
    w_at = w + (row * w_stride)[None, None, :] + part // 2 + tl.arange(0, BLOCK_K // 2)[None, :, None]
    scale_at = w_scale + (row * scale_stride)[None, :] + group
    zero_at = zero + (row * zero_stride)[None, :] + group
    total = tl.zeros([PARTS, BLOCK_T, BLOCK_N], tl.float32)
    fetch_ahead(w + row * w_stride, K // 2)
    take_turn()
    by, offset = of_step(scale_at, zero_at, 0, HAS_ZERO)
    for step in range(K // PARTS // BLOCK_K):
        # A step ahead, as in `gemm_tile.product`.
        next_by, next_offset = of_step(scale_at, zero_at, tl.minimum(step + 1, K // PARTS // BLOCK_K - 1), HAS_ZERO)
        pairs = tl.reshape(tl.load(x_at + step * BLOCK_K), [PARTS, BLOCK_T, BLOCK_K // 2, 2])
        even, odd = tl.split(pairs)
        low, high = numbers_of(tl.load(w_at + step * (BLOCK_K // 2)), offset, even.dtype, "int4", PTX)
        made = dot(even, low, tl.zeros([PARTS, BLOCK_T, BLOCK_N], tl.float32))
        made += dot(odd, high, tl.zeros([PARTS, BLOCK_T, BLOCK_N], tl.float32))
        total += made * by[:, None, :]
        by, offset = next_by, next_offset
    value = tl.sum(total, axis=0)
    if HAS_BIAS:
        value += widen(tl.load(bias + column, column < N, other=0.0))[None, :]
    at = y + token[:, None] * N + column[None, :]
    tl.store(at, rounded(value, y.dtype.element_ty), (token < T)[:, None] & (column < N)[None, :])


@triton.jit
def of_step(scale_at, zero_at, step, HAS_ZERO: tl.constexpr):
    """Scales and zeros of each part's group: [PARTS, BLOCK_N]. There are no zeros to read where a format has none: 8 is it."""
    offset = tl.full(scale_at.shape, 8, tl.int32)
    if HAS_ZERO:
        offset = tl.load(zero_at + step).to(tl.int32)
    return tl.load(scale_at + step), offset


_POINTERS = {"x": "*bf16", "w": "*u8", "w_scale": "*fp32", "zero": "*u8", "bias": "*bf16", "y": "*bf16"}
_INTEGERS = ("T", "N", "x_stride", "w_stride", "scale_stride", "zero_stride")
AOT = tuple(
    AotSpec(
        op="gemm.parts",
        name=f"int4.awq.g128, N={out}",
        kernel=_parts,
        signature=_POINTERS | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"K": 4096, "HAS_ZERO": True, "HAS_BIAS": False, "BLOCK_T": FEW, "BLOCK_K": BLOCK},
        sizes={"N": out, "K": 4096},
        odd=("T", "scale_stride", "zero_stride"),
        instructions={"sm_": ("mma", "cp.async.cg"), "gfx9": "v_mfma"},
    )
    for out in (4096, 8192, 16_384)
)
