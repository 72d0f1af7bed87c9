"""ssm.gates: both gates of all heads in one launch, from the projection as it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import sigmoid, softplus, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def gates(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """b, a: [T, Hk, Hv / Hk], rate, dt_bias: float32[Hv] -> g, beta: float32[T, Hv]."""
    b, a = dense_last(b), dense_last(a)
    num_tokens, _, group = b.shape
    heads = rate.shape[0]
    g, beta = torch.empty(2, num_tokens, heads, dtype=torch.float32, device=b.device)
    if num_tokens:
        config = choose("ssm.gates", H=heads)
        _gates[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
            b,
            a,
            rate,
            dt_bias,
            g,
            beta,
            num_tokens,
            b.stride(0),
            b.stride(1),
            a.stride(0),
            a.stride(1),
            H=heads,
            GROUP=group,
            BLOCK_H=triton.next_power_of_2(heads),
            **config,
        )
    return g, beta


@triton.jit
def _gates(
    b,
    a,
    rate,
    dt_bias,
    g,
    beta,
    T,
    b_stride_t,
    b_stride_h,
    a_stride_t,
    a_stride_h,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_T tokens, all value heads. g, beta: [T, H], dense."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    head = tl.arange(0, BLOCK_H)[None, :]
    inside, known = (token < T) & (head < H), head < H
    key, own = head // GROUP, head % GROUP
    value = widen(tl.load(b + token * b_stride_t + key * b_stride_h + own, inside, other=0.0))
    tl.store(beta + token * H + head, sigmoid(value), inside)
    value = widen(tl.load(a + token * a_stride_t + key * a_stride_h + own, inside, other=0.0))
    value = softplus(value + tl.load(dt_bias + head, known, other=0.0))
    tl.store(g + token * H + head, value * tl.load(rate + head, known, other=0.0), inside)


_SIGNATURE = {
    **dict.fromkeys(("b", "a"), "*bf16"),
    **dict.fromkeys(("rate", "dt_bias", "g", "beta"), "*fp32"),
    **dict.fromkeys(("T", "b_stride_t", "b_stride_h", "a_stride_t", "a_stride_h"), "i32"),
}
AOT = (
    AotSpec(
        op="ssm.gates",
        name="H=32",
        kernel=_gates,
        signature=_SIGNATURE,
        constexprs={"H": 32, "GROUP": 2, "BLOCK_H": 32},
        sizes={"H": 32},
        odd=("T", "b_stride_h", "a_stride_h"),
    ),
)
