"""Activations as codes: what linear layers and experts multiply where their weights ask for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import SATFINITE, WIDE, AotSpec
from sglang_triton.codes import encode_e4m3, encode_int8
from sglang_triton.numerics import quotient, widen
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

BLOCK = 128  # columns that share a scale of "fp8_block"


def quantise(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x: [T, K], rows dense -> codes uint8 (of e4m3fn) or int8 [T, K], scale: float32[T, 1], or [T, ceil(K / 128)] for "fp8_block"."""
    num_tokens, width = x.shape
    group = BLOCK if kind == "fp8_block" else width
    code, scale = empty_codes(num_tokens, width, kind, x.device)
    config = dict(choose("quant.activations", K=group))
    _quantise[(triton.cdiv(num_tokens, config["BLOCK_T"]), scale.shape[1])](
        x,
        code,
        scale,
        num_tokens,
        width,
        x.stride(0),
        GROUP=group,
        KIND="int8" if kind == "int8" else "fp8",
        BLOCK_K=triton.next_power_of_2(group),
        **config,
    )
    return code, scale


def empty_codes(num_tokens: int, width: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for what `quantise` gives."""
    code = torch.empty(num_tokens, width, dtype=torch.int8 if kind == "int8" else torch.uint8, device=device)
    groups = triton.cdiv(width, BLOCK) if kind == "fp8_block" else 1
    return code, torch.empty(num_tokens, groups, dtype=torch.float32, device=device)


@triton.jit
def _quantise(
    x,
    code,
    scale,
    T,
    K,
    stride,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SATFINITE: tl.constexpr,
):
    """One program: a group of columns of BLOCK_T rows. A scale is the largest magnitude over the largest code, 1 where that is 0."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    inner = tl.arange(0, BLOCK_K)[None, :]
    column = tl.program_id(1) * GROUP + inner
    inside = (row < T) & (column < K) & (inner < GROUP)
    value, step = coded(widen(tl.load(x + row * stride + column, inside, other=0.0)), KIND, SATFINITE)
    tl.store(code + row * K + column, value, inside)
    tl.store(scale + row * tl.num_programs(1) + tl.program_id(1), step, row < T)


@triton.jit
def coded(x, KIND: tl.constexpr, SATFINITE: tl.constexpr):
    """x: float32[..., n], zeros outside -> codes of its kind, and the scale of each row: [..., 1]."""
    step = tl.div_rn(tl.max(tl.abs(x), axis=len(x.shape) - 1, keep_dims=True), 127.0 if KIND == "int8" else 448.0)
    step = tl.where(step == 0.0, 1.0, step)
    value = quotient(x, step)
    return encode_int8(value) if KIND == "int8" else encode_e4m3(value, SATFINITE), step


AOT = tuple(
    AotSpec(
        op="quant.activations",
        name=f"{kind}, K={group}",
        kernel=_quantise,
        signature={
            "x": "*bf16",
            "code": "*i8" if kind == "int8" else "*u8",
            "scale": "*fp32",
            "T": "i32",
            "K": "i32",
            "stride": "i32",
        },
        constexprs={"GROUP": group, "KIND": kind, "BLOCK_K": group},
        sizes={"K": group},
        odd=("T",),
        instructions=WIDE | (SATFINITE if kind == "fp8" else {}),
    )
    for kind, group in (("fp8", 128), ("fp8", 4096), ("fp8", 16_384), ("int8", 4096))
)
