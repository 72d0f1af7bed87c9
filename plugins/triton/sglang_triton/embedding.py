"""embed.lookup."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import WIDE_EVERYWHERE, AotSpec
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def embed_lookup(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """ids: int32[T], weight: [V, M] -> [T, M]; zeros for ids outside [vocab_start, vocab_start + V)."""
    weight = dense_last(weight)
    vocab, width = weight.shape
    y = weight.new_empty(ids.shape[0], width)
    if y.numel():
        config = choose("embed.lookup", M=width)
        grid = (triton.cdiv(ids.shape[0], config["BLOCK_T"]), triton.cdiv(width, config["BLOCK_M"]))
        _lookup[grid](
            ids, weight, y, ids.shape[0], vocab, width, ids.stride(0), weight.stride(0), vocab_start, **config
        )
    return y


@triton.jit
def _lookup(ids, weight, y, T, V, M, stride_ids, stride, vocab_start, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    take_turn()
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    local = tl.load(ids + row * stride_ids, row < T, other=-1).to(tl.int64) - vocab_start
    inside = (row < T) & (column < M)
    value = tl.load(weight + local * stride + column, inside & (local >= 0) & (local < V), other=0.0)
    tl.store(y + row * M + column, value, inside)


_SIGNATURE = {"ids": "*i32", "weight": "*bf16", "y": "*bf16", "T": "i32", "V": "i32", "M": "i32", "stride_ids": "i32"}
AOT = tuple(
    AotSpec(
        op="embed.lookup",
        name=f"M={width}",
        kernel=_lookup,
        signature=_SIGNATURE | {"stride": "i32", "vocab_start": "i32"},
        sizes={"M": width},
        odd=("T", "stride_ids", "vocab_start"),
        instructions=WIDE_EVERYWHERE,
    )
    for width in (1024, 4096)
)
