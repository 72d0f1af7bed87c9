"""Quantised products, and formats of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_npu_emulation.contract import HALVES, emulated, require, require_contiguous, require_dtype

ND, FRACTAL_NZ = 2, 29
INNER = 65535
LARGEST = 127  # of int8
CODES = 8  # of 4 bits, in an int32
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
    require(
        smooth_scales is None and group_index is None and dst_type in (None, 1), "smoothing and int4 are not emulated"
    )
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


@emulated("npu_convert_weight_to_int4pack")
def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    require(weight.dtype == torch.int32 and weight.dim() == 2, "weight is int32[K, N]")
    require(weight.shape[1] % CODES == 0, f"the last dim is a multiple of {CODES}, not {weight.shape[1]}")
    require_contiguous(weight=weight)
    require(bool((weight >= -8).all() and (weight <= 7).all()) and inner_k_tiles == 0, "codes are -8 to 7")
    nibbles = (weight & 15).view(len(weight), -1, CODES)
    packed = torch.zeros(nibbles.shape[:2], dtype=torch.int32)
    for i in range(CODES):
        packed |= nibbles[..., i] << (4 * i)
    return packed


def codes(weight: Tensor) -> Tensor:
    """int32[..., N / 8] as they are laid above -> float32[..., N], -8 to 7."""
    return torch.stack([(weight << (28 - 4 * i)) >> 28 for i in range(CODES)], dim=-1).flatten(-2).float()


@emulated("npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """Codes of 4 bits, as npu_convert_weight_to_int4pack lays them. What they stand for is rounded to the dtype of x before it is multiplied."""
    require(
        quant_scale is None and quant_offset is None and inner_precise == 0 and weight_dtype is None, "not emulated"
    )
    require_dtype(HALVES, x=x)
    require(x.dim() == weight.dim() == 2 and weight.dtype == torch.int32, "x: [M, K], weight: int32[K, N / 8]")
    require_contiguous(weight=weight, bias=bias)
    (rows, inner), columns = x.shape, weight.shape[1] * CODES
    require(rows > 0 and 1 <= inner <= INNER and 1 <= columns <= INNER, f"K and N up to {INNER}, and nothing empty")
    require(inner == len(weight), f"{list(x.shape)} by {list(weight.shape)}")
    size = antiquant_group_size
    require(
        size == 0 or (size % 32 == 0 and 32 <= size <= inner - 1), f"groups of 32, 64, ... K - 1 columns, not {size}"
    )
    groups = -(-inner // size) if size else 1
    require(
        antiquant_scale.shape == (groups, columns), f"scales [{groups}, {columns}], not {list(antiquant_scale.shape)}"
    )
    require(antiquant_scale.dtype == x.dtype, f"scales are of {x.dtype}, not of {antiquant_scale.dtype}")
    offset = antiquant_offset
    require(
        offset is None or (offset.shape, offset.dtype) == (antiquant_scale.shape, x.dtype), "offsets are like scales"
    )
    wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    require(bias is None or (bias.dtype == wanted and bias.shape == (columns,)), f"bias: {wanted}[N]")
    code = codes(weight)
    spread = torch.arange(inner) // (size or inner)
    code = code if offset is None else code + offset.float()[spread]
    y = x.float() @ (code * antiquant_scale.float()[spread]).to(x.dtype).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


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
