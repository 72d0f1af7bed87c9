"""logits.mask, logits.adjust and logits.soft_cap."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import tanh, widen
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn


def mask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """logits: [R, V], bitmask: int32[R, ceil(V / 32)] -> [R, V], -inf where a token's bit is 0."""
    logits, bitmask = dense_last(logits), dense_last(bitmask)
    out = logits.new_empty(logits.shape)
    if out.numel():
        (rows, vocab), config = logits.shape, choose("logits.mask", V=logits.shape[1])
        grid = (triton.cdiv(rows, config["BLOCK_R"]), triton.cdiv(vocab, config["BLOCK_V"]))
        _mask[grid](logits, bitmask, out, rows, vocab, logits.stride(0), bitmask.stride(0), **config)
    return out


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """logits: [R, V] -> cap * tanh(logits / cap): float32[R, V]."""
    return _map(logits, cap, capped=True)


def adjust(logits: Tensor, rows: Tensor, ids: Tensor, repetition: Tensor, add: Tensor) -> Tensor:
    """logits: [R, V]; rows, ids: int32[E]; repetition, add: float32[E] -> float32[R, V], a new tensor."""
    out = _map(logits, 1.0, capped=False)
    if rows.shape[0]:
        logits, config = dense_last(logits), choose("logits.adjust", E=rows.shape[0])
        grid = (triton.cdiv(rows.shape[0], config["BLOCK_E"]),)
        entries = [x.contiguous() for x in (rows, ids, repetition, add)]
        _adjust[grid](logits, *entries, out, rows.shape[0], logits.shape[1], logits.stride(0), **config)
    return out


def _map(logits: Tensor, cap: float, *, capped: bool) -> Tensor:
    """logits in float32, a new tensor."""
    logits = dense_last(logits)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if out.numel():
        (rows, vocab), config = logits.shape, choose("logits.soft_cap", V=logits.shape[1])
        grid = (triton.cdiv(rows, config["BLOCK_R"]), triton.cdiv(vocab, config["BLOCK_V"]))
        _cap[grid](logits, out, rows, vocab, logits.stride(0), cap, CAPPED=capped, **config)
    return out


@triton.jit
def _mask(logits, bitmask, out, R, V, stride, mask_stride, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Token i is bit i % 32 of word i // 32."""
    take_turn()
    row, token, inside = block(R, V, BLOCK_R, BLOCK_V)
    x = tl.load(logits + row * stride + token, inside, other=0.0)
    word = tl.load(bitmask + row * mask_stride + token // 32, inside, other=0)
    allowed = ((word >> (token % 32)) & 1) == 1
    # In x's own dtype: what is allowed is copied, and never converted.
    tl.store(out + row * V + token, tl.where(allowed, x, tl.full(x.shape, float("-inf"), x.dtype)), inside)


@triton.jit
def _cap(logits, out, R, V, stride, cap, CAPPED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    take_turn()
    row, token, inside = block(R, V, BLOCK_R, BLOCK_V)
    x = widen(tl.load(logits + row * stride + token, inside, other=0.0))
    tl.store(out + row * V + token, cap * tanh(x / cap) if CAPPED else x, inside)


@triton.jit
def _adjust(logits, rows, ids, repetition, add, out, E, V, stride, BLOCK_E: tl.constexpr):
    """What an entry changes is stored, and padding, which changes nothing, stores nothing: it may name an entry in use."""
    take_turn()
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = entry < E
    row = tl.load(rows + entry, there, other=0).to(tl.int64)
    token = tl.load(ids + entry, there, other=0)
    factor = tl.load(repetition + entry, there, other=1.0)
    old = widen(tl.load(logits + row * stride + token, there, other=0.0))
    new = tl.where(old > 0, old / factor, old * factor) + tl.load(add + entry, there, other=0.0)
    tl.store(out + row * V + token, new, there & (new != old))


@triton.jit
def block(R, V, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """This program's rows int64[BLOCK_R, 1], tokens int32[1, BLOCK_V], and which of them there are."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    token = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    return row, token, (row < R) & (token < V)


_SIZES = {"R": "i32", "V": "i32", "stride": "i32"}
_ENTRIES = {"rows": "*i32", "ids": "*i32", "repetition": "*fp32", "add": "*fp32"}
AOT = (
    AotSpec(
        op="logits.mask",
        kernel=_mask,
        signature={"logits": "*bf16", "bitmask": "*i32", "out": "*bf16", "mask_stride": "i32"} | _SIZES,
        sizes={"V": 151_936},
        odd=("R", "mask_stride"),
    ),
    *(
        AotSpec(
            op="logits.soft_cap" if capped else "logits.adjust",
            tuned_as="logits.soft_cap",
            name="" if capped else "copy",
            kernel=_cap,
            signature={"logits": "*bf16", "out": "*fp32", "cap": "fp32"} | _SIZES,
            constexprs={"CAPPED": capped},
            sizes={"V": 151_936},
            odd=("R",),
        )
        for capped in (True, False)
    ),
    AotSpec(
        op="logits.adjust",
        kernel=_adjust,
        signature={"logits": "*bf16", **_ENTRIES, "out": "*fp32", "E": "i32", "V": "i32", "stride": "i32"},
        sizes={"E": 1024},
        odd=("E",),
    ),
)
