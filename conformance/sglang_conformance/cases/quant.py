"""Quantised weights: making them, undoing that, and the products with them, in every format."""

from __future__ import annotations

from typing import Any

import torch

from sglang_conformance.case import FLOATS, Case, Outputs, add
from sglang_conformance.cases.dense import linear
from sglang_conformance.cases.moe import OAI, fused, grouped
from sglang_conformance.env import X_SCALE, Env
from sglang_core.ops.formats import Fmt

FORMATS = (
    *("fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym"),
    *("int4.awq.g128", "int4.awq.g32", "int4.gptq.g64", "int4.gptq.g128.act_order", "int4.pack.g128", "int4.pack.g-1"),
    *("w4a8_fp8.g128", "mxfp4.g32", "nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
)
TENSORS = ("weight", "scale", "zero", "group", "global_scale", "x_scale")


def quantize(env: Env, fmt: str) -> Outputs:
    """Codes and scales, bit for bit. One row is zeros."""
    op = env.op("quant.quantize", fmt=fmt)
    w = env.normal(70, 256)
    w[3] = 0
    x_scale = env.place(torch.tensor([X_SCALE])).float() if Fmt.parse(fmt).static else None
    return {name: t.contiguous().view(torch.uint8) for name, t in op(w, fmt, x_scale=x_scale).named_buffers()}


def dequantize(env: Env, fmt: str) -> Outputs:
    op = env.op("quant.dequantize", fmt=fmt)
    dtype = env.normal(1).dtype  # the oracle's is float64
    return {"matrix": op(env.canonical(fmt, 70, 256), dtype), "stack": op(env.canonical(fmt, 3, 40, 256), dtype)}


def add_formats(
    op: str, run: Any, name: str = "", *, rounds_between: bool = False, exact: tuple[str, ...] = ()
) -> None:
    """`rounds_between`: it quantises a result of its own. Rounded to a half type, that may fall on the next code, and the
    oracle's not: such formats are compared in float32."""
    for fmt in FORMATS:
        dtypes = (torch.float32,) if rounds_between and Fmt.parse(fmt).activation != "as_is" else FLOATS
        add(Case(op=op, name=fmt + name, fmt=fmt, run=lambda env, f=fmt: run(env, f), dtypes=dtypes, exact=exact))


add_formats("quant.quantize", quantize, exact=TENSORS)
add_formats("quant.dequantize", dequantize)
for rows in (0, 1, 37):
    add_formats("gemm.linear", lambda env, fmt, n=rows: linear(env, n, 256, 192, bias=True, fmt=fmt), f", {rows} rows")
add_formats("gemm.grouped", lambda env, fmt: grouped(env, (3, 0, 9), 256, 192, bias=True, fmt=fmt))
add_formats(
    "moe.fused",
    lambda env, fmt: fused(env, 5, OAI, hidden=256, width=128, bias=True, remote=True, fmt=fmt),
    rounds_between=True,
)
