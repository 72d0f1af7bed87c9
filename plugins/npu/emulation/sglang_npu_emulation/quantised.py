"""Quantised products, and formats of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_npu_emulation.contract import HALVES, emulated, require, require_contiguous, require_dtype

ND, FRACTAL_NZ = 2, 29
INNER = 65535
LARGEST = 127  # of int8
EXACT_COLUMNS = 512  # of int8 products whose sum float32 holds exactly


@emulated("npu_dynamic_quant")
def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    require_dtype(HALVES, input=x)
    require(x.dim() > 1 and x.numel() > 0, "x has two dims or more, and is not empty")
    require(smooth_scales is None and group_index is None and dst_type in (None, 1), "smoothing and int4 are not emulated")
    require(quant_mode == "pertoken", f"quant_mode {quant_mode} is not emulated")
    wide = x.float()
    scale = wide.abs().amax(-1) / LARGEST
    code = (wide / scale[..., None]).nan_to_num(nan=0.0).round().clamp(-LARGEST - 1, LARGEST)
    return code.to(torch.int8), scale


@emulated("npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **others: object,
) -> Tensor:
    require(not others, f"{', '.join(others)}: not emulated")
    require(x1.dtype == x2.dtype == torch.int8, "x1 and x2 are int8")
    require(offset is None and pertoken_scale is not None, "a scale for each token, and no offset")
    require(min(x1.numel(), x2.numel(), scale.numel()) > 0, "x1, x2 and scale are not empty")
    require(x1.dim() == x2.dim() == 2 and max(x1.shape[1], x2.shape[1]) <= INNER, f"last dims up to {INNER}")
    assert pertoken_scale is not None
    dtype = {5: torch.float16, 15: torch.bfloat16}.get(output_dtype or 1)
    require(dtype is not None, f"output_dtype {output_dtype} is not emulated")
    assert dtype is not None
    rows, columns = len(x1), x2.shape[1]
    require_dtype((torch.float32,), pertoken_scale=pertoken_scale)
    require(pertoken_scale.shape == (rows,) and scale.shape in ((1,), (columns,)), "scales: [M], and [N] or [1]")
    require_dtype((torch.float32,) if dtype == torch.float16 else (torch.float32, torch.bfloat16), scale=scale)
    require_dtype((torch.int32, torch.float32, dtype), bias=bias)
    require(bias is None or bias.shape == (columns,), "bias: [N]")
    require_contiguous(x1=x1)
    total = torch.zeros(rows, columns, dtype=torch.int32)
    for i in range(0, x1.shape[1], EXACT_COLUMNS):
        at = slice(i, i + EXACT_COLUMNS)
        total += (x1[:, at].float() @ x2[at].float()).int()
    if bias is not None and bias.dtype == torch.int32:
        total, bias = total + bias, None
    y = total.float() * scale.float() * pertoken_scale[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


@emulated("npu_format_cast")
def format_cast(
    x: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """Where its elements lie is the device's own affair: numbers and shape stay."""
    require(acl_format in (ND, FRACTAL_NZ), f"format {acl_format} is not emulated")
    require(customize_dtype is None and input_dtype is None, "other dtypes are not emulated")
    require(acl_format == ND or x.dim() in (2, 3), f"FRACTAL_NZ is of matrices, not of {x.dim()} dims")
    require_dtype((*HALVES, torch.int8), input=x)
    return x.clone()
