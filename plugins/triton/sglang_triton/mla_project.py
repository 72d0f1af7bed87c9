"""attn.mla_project: a matrix per head. The result is dense by token, as what comes after wants it; a BLAS leaves it by head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.gemm import DOTS, INVARIANT_TOKENS
from sglang_triton.numerics import dot, rounded
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def mla_project(x: Tensor, weight: Tensor) -> Tensor:
    """x: [T, Hq, I], weight: [Hq, I, O] -> [T, Hq, O] in x.dtype."""
    return _launch(x, weight, x.shape[0])


def mla_project_invariant(x: Tensor, weight: Tensor) -> Tensor:
    """As `mla_project`, in the same tiles whatever the batch, so that each row is summed in the same order."""
    return _launch(x, weight, INVARIANT_TOKENS)


def _launch(x: Tensor, weight: Tensor, tiles_for: int) -> Tensor:
    """`tiles_for`: the number of tokens whose tiles are taken."""
    x = dense_last(x)
    (num_tokens, heads, depth), width = x.shape, weight.shape[2]
    y = torch.empty(num_tokens, heads, width, dtype=x.dtype, device=x.device)
    if y.numel():
        config = choose("attn.mla_project", T=tiles_for, BITS=8 * x.dtype.itemsize)
        grid = (triton.cdiv(num_tokens, config["BLOCK_T"]), triton.cdiv(width, config["BLOCK_N"]), heads)
        _project[grid](
            x, weight, y, num_tokens, width, heads, x.stride(0), x.stride(1), *weight.stride(), K=depth, **config
        )
    return y


@triton.jit
def _project(
    x,
    weight,
    y,
    T,
    N,
    H,
    x_stride_t,
    x_stride_h,
    w_stride_h,
    w_stride_k,
    w_stride_n,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_T tokens by BLOCK_N columns of one head. Either dim of a matrix may be the dense one."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    head = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + token * x_stride_t + head * x_stride_h + inner[None, :], (token < T) & (inner < K)[None, :], other=0.0
        )
        at = weight + head * w_stride_h + inner[:, None] * w_stride_k + column * w_stride_n
        total = dot(a, tl.load(at, (inner < K)[:, None] & (column < N), other=0.0), total)
    tl.store(y + (token * H + head) * N + column, rounded(total, y.dtype.element_ty), (token < T) & (column < N))


_SIZES = ("T", "N", "H", "x_stride_t", "x_stride_h", "w_stride_h", "w_stride_k")
AOT = tuple(
    AotSpec(
        op="attn.mla_project",
        name=f"{name}, T={tokens}",
        kernel=_project,
        signature=dict.fromkeys(("x", "weight", "y"), of) | dict.fromkeys(_SIZES, "i32"),
        constexprs={"K": depth, "w_stride_n": 1},
        sizes={"T": tokens, "BITS": 32 if of == "*fp32" else 16},
        odd=("T",),
        instructions={} if of == "*fp32" else DOTS,
    )
    for name, depth, of, tokens in (
        ("in", 128, "*bf16", 16),
        ("out", 512, "*bf16", 16),
        ("out", 512, "*bf16", 4096),
        ("out, float32", 512, "*fp32", 16),
    )
)
