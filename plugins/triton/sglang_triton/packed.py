"""Canonical weights as kernels take them: pointers, and what their format says at compile time."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight

BLOCK = 128  # rows and columns that share a scale of fp8.block128; also the longest step along the inputs
FEW = 16  # rows of a tile of the tensor cores
FORMATS = (
    "fp8.block128",
    "fp8.token_channel",
    "int8.token_channel",
    "int4.awq.g128",
    "mxfp4.g32",
)  # compiled ahead of time


def as_codes(w: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.., out, in], two a byte if of four bits; scales [.., rows, groups]; zeros likewise. What there is not is any tensor."""
    fmt, code = Fmt.parse(w.fmt), w["weight"]
    if fmt.is_dense:
        return code, code, code
    scale = w["scale"]
    scale = scale[..., None] if scale.dim() < code.dim() else scale
    return code.view(torch.uint8) if fmt.element == "fp8" else code, scale, w["zero"] if fmt.has_zero else scale


def format_constexprs(name: str, in_features: int) -> dict[str, object]:
    """What `gemm_tile.product` wants to know of a format."""
    fmt = Fmt.parse(name)
    group = in_features if fmt.group in (None, -1) else int(fmt.group or 0)
    step = min(BLOCK, group) if group < in_features and fmt.element != "e2m1" else BLOCK
    return {
        "K": in_features,
        "ELEMENT": fmt.element,
        "GROUP": group,
        "ROWS": BLOCK if fmt.activation == "fp8_block" else 1,
        "ACTIVATION": fmt.activation,
        "HAS_ZERO": fmt.has_zero,
        "BLOCK_K": 64 if fmt.is_dense else step,
    }


def bits(name: str) -> int:
    """Of a weight's code: 4, 8 or 16. Codes of four bits are widened in registers, so their tiles are smaller."""
    return {"int4": 4, "e2m1": 4, "fp8": 8, "int8": 8}.get(Fmt.parse(name).element, 16)


def weight_sizes(name: str, out_features: int, in_features: int) -> dict[str, int | str]:
    """What configs of a product are chosen by, beside its rows."""
    return {"N": out_features, "K": in_features, "FMT": name, "BITS": bits(name)}


def format_types(name: str) -> dict[str, str]:
    """Of x, w and w_scale, in Triton's words, where activations are bfloat16."""
    fmt = Fmt.parse(name)
    codes = {"fp8": "*u8", "int8": "*i8"}.get(fmt.element)
    scale = "*bf16" if fmt.is_dense else "*u8" if fmt.element == "e2m1" else "*fp32"
    return {"x": codes or "*bf16", "w": codes or ("*bf16" if fmt.is_dense else "*u8"), "w_scale": scale}
