"""Quantised weights: making them, undoing that, and the products with them, in every format."""

from __future__ import annotations

from typing import Any

import torch

from sglang_conformance.case import FLOATS, Case, Outputs, add
from sglang_conformance.cases.dense import linear, linear_gated, linear_rows
from sglang_conformance.cases.moe import OAI, fused, grouped
from sglang_conformance.cases.rows import PADDED, SLICED, TOGETHER, add_rows
from sglang_conformance.env import X_SCALE, Env
from sglang_core.ops.formats import Fmt
from sglang_core.ops.weight import PackedWeight

FORMATS = (
    *("fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym"),
    *("int4.awq.g128", "int4.awq.g32", "int4.gptq.g64", "int4.gptq.g128.act_order", "int4.pack.g128", "int4.pack.g-1"),
    *("w4a8_fp8.g128", "mxfp4.g32", "nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
)
TENSORS = ("weight", "scale", "zero", "group", "global_scale", "x_scale")


def quantize(env: Env, fmt: str, columns: int = 256) -> Outputs:
    """Codes and scales, bit for bit. One row is zeros, one huge, one tiny, one has a single number that is not small."""
    op = env.op("quant.quantize", fmt=fmt)
    w = env.normal(70, columns)
    w[3] = 0
    w[5] *= 8e3
    w[7] *= 1e-4
    w[9, 1:] *= 1e-3
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


def any_codes(env: Env, fmt: str, rows: int, columns: int) -> PackedWeight:
    """Every finite code there is, and scales over nine powers of two, some of them zero; zero points at their ends, too.

    What a quantiser makes has codes in the middle mostly, and neither the smallest nor the largest zero point.
    """
    f = Fmt.parse(fmt)
    made = dict(env.canonical(fmt, rows, columns).named_buffers())

    def spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        pick = env.integers(0, len(values), like.numel()).long().cpu()
        return values[pick].view(like.shape).to(like.dtype).to(env.device)

    # Small enough for products with large activations to fit float16.
    scales = torch.tensor([1.0] if f.one_scale else [0.0, *(2.0**-n for n in range(9)), 0.75, 0.375]) * 2.0**-7
    codes = torch.arange(256, dtype=torch.uint8)
    if f.element == "fp8":
        codes = codes[~codes.view(torch.float8_e4m3fn).isnan()]
        weight = made["weight"].view(torch.uint8)
        made["weight"] = spread(codes, weight).view(torch.float8_e4m3fn)
    elif f.element == "int8":
        made["weight"] = spread(torch.arange(-127, 128, dtype=torch.int8), made["weight"])
    else:
        made["weight"] = spread(codes, made["weight"])
    if "zero" in made:
        top = 15 if fmt.startswith("int4.awq") else 16
        made["zero"] = spread(torch.tensor([0, 1, 7, 8, 15, top], dtype=torch.uint8), made["zero"])
    if made["scale"].dtype == torch.uint8:  # exponents
        made["scale"] = spread(torch.arange(119, 128, dtype=torch.uint8), made["scale"])
    else:  # e4m3 scales have another, small one over them
        made["scale"] = spread(scales if made["scale"].dtype == torch.float32 else scales * 2.0**14, made["scale"])
    return PackedWeight(fmt, made, out_features=rows, in_features=columns)


def any_linear(env: Env, fmt: str, columns: int = 256) -> Outputs:
    """Rows of zeros, of large and of tiny numbers among others. Each is looked at alone: they differ in size by much."""
    f = Fmt.parse(fmt)
    given, run = linear_rows(env, 6, columns, 70, fmt=fmt, bias=False, weight=any_codes(env, fmt, 70, columns))
    x = given["x"]
    x[1] = 0.0
    x[2] *= 128.0  # past what a static scale reaches: saturated
    x[3] *= 2.0**-10
    x[4, 1:] *= 2.0**-7  # by powers of two, which round nothing: the oracle's rows are the same
    y = run(given)["y"]
    tiny = {} if f.static else {"of tiny numbers": y[3]}
    return {"of zeros": y[1], "of large numbers": y[2], "of one large number": y[4], "of others": y[[0, 5]]} | tiny


def each_code(env: Env, fmt: str) -> Outputs:
    """Every number of fp8, -0 and the largest among them, alone in a product: what a sum of many would hide."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes.view(torch.float8_e4m3fn).isnan()] = 0x80
    weight = env.canonical(fmt, 70, 256)
    rolled = torch.stack([codes.roll(i) for i in range(70)]).view(torch.float8_e4m3fn)
    made = dict(weight.named_buffers()) | {"weight": rolled.to(env.device)}
    w = PackedWeight(fmt, made, out_features=70, in_features=256)
    given, run = linear_rows(env, 256, 256, 70, fmt=fmt, bias=False, weight=w)
    given["x"].zero_().fill_diagonal_(448.0)  # is a code itself, its scale 1
    return run(given)


def any_matrix(env: Env, fmt: str) -> Outputs:
    dtype = env.normal(1).dtype  # the oracle's is float64
    return {"matrix": env.op("quant.dequantize", fmt=fmt)(any_codes(env, fmt, 70, 256), dtype)}


ODD_COLUMNS = 212  # even, as two codes are a byte; no multiple of any group
ODD_FORMATS = tuple(fmt for fmt in FORMATS if not fmt.startswith(("mxfp4", "nvfp4")))
add_formats("quant.quantize", quantize, exact=TENSORS)
add_formats("quant.dequantize", dequantize)
add_formats("quant.dequantize", any_matrix, ", any codes")
for rows in (0, 1, 37):
    add_formats("gemm.linear", lambda env, fmt, n=rows: linear(env, n, 256, 192, bias=True, fmt=fmt), f", {rows} rows")
add_formats("gemm.linear", any_linear, ", any codes")
add_formats("gemm.linear_gated", lambda env, fmt: linear_gated(env, 5, fmt=fmt))
for fmt in (fmt for fmt in FORMATS if Fmt.parse(fmt).element == "fp8"):
    add(Case(op="gemm.linear", name=f"{fmt}, each code", fmt=fmt, run=lambda env, f=fmt: each_code(env, f)))
for fmt in FORMATS:
    add_rows(
        "gemm.linear",
        lambda env, rows, f=fmt: linear_rows(env, rows, fmt=f),
        name=fmt,
        relations=(TOGETHER, PADDED, SLICED),
        fmt=fmt,
    )
    for op, run in {
        "quant.quantize": lambda env, f=fmt: quantize(env, f, ODD_COLUMNS),
        "gemm.linear": lambda env, f=fmt: linear(env, 5, ODD_COLUMNS, 70, bias=True, fmt=f),
        "gemm.linear, any codes": lambda env, f=fmt: any_linear(env, f, ODD_COLUMNS),
    }.items():
        name = f"{fmt}, a group in part{op[len('gemm.linear') :] if ',' in op else ''}"
        exact = TENSORS if op == "quant.quantize" else ()
        add(
            Case(op=op.split(",")[0], name=name, fmt=fmt, run=run, exact=exact, profile="odd_sizes"),
        )
add_formats("gemm.grouped", lambda env, fmt: grouped(env, (3, 0, 9), 256, 192, bias=True, fmt=fmt))
add_formats(
    "moe.fused",
    lambda env, fmt: fused(env, 5, OAI, hidden=256, width=128, bias=True, remote=True, fmt=fmt),
    rounds_between=True,
)
