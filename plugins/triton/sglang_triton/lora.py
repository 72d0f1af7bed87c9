"""lora.apply and lora.embed: adapters of any number in one batch, without sorting it.

A tile of tokens is multiplied by each adapter that one of them has, and what is not a token's own is masked out: a tile of a long
prompt meets one adapter, a tile of sixteen decoding reqs up to sixteen, each read once. `_shrink` leaves x A^T in float32, in parts
of the sum over the inputs, so that a few tokens keep a whole device busy; `_expand` adds the parts up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import INTERPRETED, dot, rounded, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def apply(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, token_adapter: Tensor, scale: Tensor, parts: tuple[int, ...] = ()
) -> Tensor:
    """y: [T, out], x: [T, in], a: [A, P * R, in], b: [A, out, R], token_adapter: int32[T], scale: float32[A, P] -> [T, out]."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    y, x, a, b, scale = (dense_last(t) for t in (y, x, a, b, scale))
    num_tokens, (num_adapters, columns, depth) = y.shape[0], a.shape
    config = dict(choose("lora.apply", K=depth))
    splits, block_t = triton.cdiv(depth, config.pop("SPLIT_K")), config["BLOCK_T"]
    h = torch.empty(splits, num_tokens, columns, dtype=torch.float32, device=x.device)
    block_n = min(max(16, triton.next_power_of_2(columns)), config.pop("BLOCK_N"))
    block_o, block_k = config.pop("BLOCK_O"), config.pop("BLOCK_K")
    _shrink[(triton.cdiv(num_tokens, block_t), triton.cdiv(columns, block_n), splits)](
        x,
        a,
        token_adapter,
        h,
        num_tokens,
        columns,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        token_adapter.stride(0),
        A=num_adapters,
        K=depth,
        SPLIT_K=-(-depth // splits),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **config,
    )
    _expanded(y, h, b, token_adapter, scale, out, parts, block_t, block_o, config)
    return out


def embed(
    y: Tensor, ids: Tensor, a: Tensor, b: Tensor, token_adapter: Tensor, scale: Tensor, vocab_start: int = 0
) -> Tensor:
    """y: [T, M], ids: int32[T], a: [A, V, R], b: [A, M, R], token_adapter: int32[T], scale: float32[A, 1] -> [T, M]."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    y, a, b, scale = (dense_last(t) for t in (y, a, b, scale))
    num_tokens, (_, vocab, rank) = y.shape[0], a.shape
    h = torch.empty(1, num_tokens, rank, dtype=torch.float32, device=y.device)
    config = dict(choose("lora.embed"))
    _pick[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
        ids,
        a,
        token_adapter,
        h,
        num_tokens,
        vocab,
        vocab_start,
        ids.stride(0),
        a.stride(0),
        a.stride(1),
        token_adapter.stride(0),
        R=rank,
        BLOCK_R=triton.next_power_of_2(rank),
        **config,
    )
    config = dict(choose("lora.apply", K=rank))
    block_t, block_o = config["BLOCK_T"], config["BLOCK_O"]
    options = {name: value for name, value in config.items() if name == "BLOCK_T" or name.startswith("num_")}
    _expanded(y, h, b, token_adapter, scale, out, (), block_t, block_o, options)
    return out


def _expanded(
    y: Tensor,
    h: Tensor,
    b: Tensor,
    token_adapter: Tensor,
    scale: Tensor,
    out: Tensor,
    parts: tuple[int, ...],
    block_t: int,
    block_o: int,
    config: dict[str, int],
) -> None:
    """h: float32[splits, T, P * R] -> out, part after part."""
    (splits, num_tokens, columns), (num_adapters, width, rank) = h.shape, b.shape
    start = 0
    for part, size in enumerate(parts or (width,)):
        _expand[(triton.cdiv(num_tokens, block_t), triton.cdiv(size, block_o))](
            y,
            h,
            b,
            token_adapter,
            scale,
            out,
            num_tokens,
            start,
            start + size,
            columns,
            part,
            y.stride(0),
            b.stride(0),
            b.stride(1),
            token_adapter.stride(0),
            scale.stride(0),
            out.stride(0),
            A=num_adapters,
            R=rank,
            SPLITS=splits,
            BLOCK_O=block_o,
            BLOCK_R=max(16, triton.next_power_of_2(rank)),
            **config,
        )
        start += size


@triton.jit
def _pick(
    ids,
    a,
    adapter,
    h,
    T,
    V,
    vocab_start,
    ids_stride,
    a_stride_a,
    a_stride_v,
    adapter_stride,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h: float32[T, R]: row id - vocab_start of each token's own table [V, R] in a; zeros for other ids, and without an adapter."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rank = tl.arange(0, BLOCK_R)[None, :]
    own = tl.load(adapter + token * adapter_stride, token < T, other=-1).to(tl.int64)
    row = tl.load(ids + token * ids_stride, token < T, other=0).to(tl.int64) - vocab_start
    inside = ((own >= 0) & (row >= 0) & (row < V))[:, None] & (rank < R)
    value = widen(tl.load(a + own[:, None] * a_stride_a + row[:, None] * a_stride_v + rank, inside, other=0.0))
    tl.store(h + token[:, None] * R + rank, value, (token < T)[:, None] & (rank < R))


@triton.jit
def _shrink(
    x,
    a,
    adapter,
    h,
    T,
    N,
    x_stride,
    a_stride_a,
    a_stride_n,
    adapter_stride,
    A: tl.constexpr,
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h: float32[splits, T, N]: of part s of the inputs, x times the transpose of each token's own rows of a: [A, N, K]."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.load(adapter + token * adapter_stride, token < T, other=-1)
    start = tl.program_id(2) * SPLIT_K
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for index in range(A):
        mine = own == index
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            product = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for step in range(0, SPLIT_K, BLOCK_K):
                inner = start + step + tl.arange(0, BLOCK_K)
                there = (inner < K) & (inner < start + SPLIT_K)
                rows = tl.load(
                    x + token[:, None] * x_stride + inner[None, :], (token < T)[:, None] & there[None, :], other=0.0
                )
                at = a + tl.cast(index, tl.int64) * a_stride_a + column[None, :] * a_stride_n + inner[:, None]
                matrix = tl.load(at, there[:, None] & (column < N)[None, :], other=0.0)
                product = dot(rows, matrix, product)
            total += tl.where(mine[:, None], product, 0.0)
    at = h + (tl.program_id(2) * T + token)[:, None] * N + column[None, :]
    tl.store(at, total, (token < T)[:, None] & (column < N)[None, :])


@triton.jit
def _expand(
    y,
    h,
    b,
    adapter,
    scale,
    out,
    T,
    start,
    end,
    N,
    part,
    y_stride,
    b_stride_a,
    b_stride_o,
    adapter_stride,
    scale_stride,
    out_stride,
    A: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns [start, end) of the output, which belong to one part: columns [part * R, (part + 1) * R) of h: float32[SPLITS, T, N]."""
    take_turn()
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = start + tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    rank = tl.arange(0, BLOCK_R)
    own = tl.load(adapter + token * adapter_stride, token < T, other=-1)
    has_one = own >= 0
    low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for split in range(SPLITS):
        at = h + (split * T + token)[:, None] * N + part * R + rank[None, :]
        low += tl.load(at, has_one[:, None] & (rank < R)[None, :], other=0.0)
    low *= tl.load(scale + own.to(tl.int64) * scale_stride + part, has_one, other=0.0)[:, None]
    inside = (token < T)[:, None] & (column < end)[None, :]
    given = tl.load(y + token[:, None] * y_stride + column[None, :], inside, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for index in range(A):
        mine = own == index
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            at = b + tl.cast(index, tl.int64) * b_stride_a + column[None, :] * b_stride_o + rank[:, None]
            matrix = tl.load(at, (column < end)[None, :] & (rank < R)[:, None], other=0.0)
            total = dot_wide(tl.where(mine[:, None], low, 0.0), matrix, total)
    added = rounded(widen(given) + total, out.dtype.element_ty)
    tl.store(out + token[:, None] * out_stride + column[None, :], tl.where(has_one[:, None], added, given), inside)


@triton.jit
def dot_wide(x, w, acc):
    """x: float32[m, k], w: [k, n] of any float dtype -> acc + x w, with x not rounded to w's dtype.

    bfloat16 on tensor cores: x as the sum of two bfloat16, which keep 16 of its 24 bits.
    """
    if w.dtype == tl.bfloat16 and not INTERPRETED:
        high = rounded(x, tl.bfloat16)
        acc = tl.dot(high, w, acc)
        acc = tl.dot(rounded(x - widen(high), tl.bfloat16), w, acc)
    else:
        acc = tl.dot(x, widen(w), acc, input_precision="ieee")
    return acc


_POINTERS = {
    "x": "*bf16",
    "a": "*bf16",
    "b": "*bf16",
    "y": "*bf16",
    "out": "*bf16",
    "adapter": "*i32",
    "h": "*fp32",
    "scale": "*fp32",
}
_INTEGERS = (
    *("T", "N", "start", "end", "part", "x_stride", "y_stride", "out_stride", "scale_stride", "adapter_stride"),
    *("V", "vocab_start", "ids_stride", "a_stride_v"),
    *("a_stride_a", "a_stride_n", "b_stride_a", "b_stride_o"),
)
# A config has the tile sizes of both kernels; each compilation takes its own.
_ADAPTERS = tuple(
    AotSpec(
        op="lora.apply",
        name=name,
        kernel=kernel,
        signature=_POINTERS | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"A": 8, "K": 4096, "R": 16, "SPLITS": 8, "BLOCK_R": 16},
        sizes={"K": 4096},
        odd=("T", "part", "scale_stride", "adapter_stride"),
        instructions={"sm_90": "mma", "gfx9": "mfma"},
    )
    for name, kernel in (("shrink", _shrink), ("expand", _expand))
)
AOT = (
    *_ADAPTERS,
    AotSpec(
        op="lora.embed",
        kernel=_pick,
        signature=_POINTERS | {"ids": "*i32"} | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"R": 16, "BLOCK_R": 16},
        odd=("T", "V", "vocab_start", "ids_stride", "adapter_stride"),
    ),
)
