"""Matrix products with packed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.codes import CODE_KINDS, Codes, decoded
from sglang_core.ops.formats import Fmt
from sglang_core.ops.quant import dequantize, quantize_token, quantize_token_asym, quantized_activations
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide_dtype
from sglang_core.ops.weight import PackedWeight

TILE_ROWS = tuple(2**i for i in range(9))
COPY_ROWS = 16  # copying an expert takes as long as multiplying so many rows by it: 2 to 150 on the hosts we measured
DEQUANTIZE_ROWS = 64  # the same for one that is dequantised on the way: each is then seldom fetched twice
COPY_ELEMENTS = 1 << 22  # of expert weights copied at a time
EXACT_COLUMNS = 512  # of int8 products (255 x 128 at most) whose sum float32 holds exactly


def dense(weight: Tensor) -> PackedWeight:
    """weight: [out, in], or a stack [X, out, in] -> the same in the "dense" format, its one tensor named `weight`."""
    num_experts = weight.shape[0] if weight.ndim == 3 else None
    out_features, in_features = weight.shape[-2:]
    return PackedWeight(
        "dense", {"weight": weight}, out_features=out_features, in_features=in_features, num_experts=num_experts
    )


@op("gemm.linear", weighted=True)
def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], w: [out, in], bias: [out] -> [..., out]. Sums in float32 or wider, adds the bias, rounds to x.dtype.

    w in any format: x is quantised as its format says (`ops/quant.py`), never rounded otherwise; int8 codes are summed as
    integers, exactly, and then scaled; all others are products of what codes and scales stand for.

    x may be quantised already, as w's format says, where the kernel has the feature `takes_codes`: with the same result, to the bit.
    """
    if isinstance(x, Codes):
        assert Fmt.parse(w.fmt).activation in CODE_KINDS, f"a weight in {w.fmt} does not quantise activations so"
    elif w.fmt == "dense":
        return F.linear(x, _dense_tensor(w), bias)
    y = _packed_product(x, w)
    return (y if bias is None else y + bias).to(x.dtype)


def _packed_product(x: Tensor | Codes, w: PackedWeight) -> Tensor:
    """x: [..., in], w: [out, in] -> [..., out]; or x: [n, h, in] and a stack of n -> [n, h, out]. Float32, or float64 as x is."""
    fmt = Fmt.parse(w.fmt)
    assert w.layout == "canonical", f"no reference body for {w.fmt}/{w.layout}"
    if fmt.element == "int8":
        return _int8_product(x, w, asymmetric=fmt.activation == "int8_asym")
    if isinstance(x, Codes):
        wide_x = decoded(x)
        return wide_x @ dequantize(w, wide_x.dtype).mT
    x_scale = w["x_scale"] if fmt.static else None
    if x_scale is not None and w.num_experts is not None:
        x_scale = x_scale[:, None]
    wide_x = quantized_activations(x, fmt, x_scale)
    return wide_x @ dequantize(w, wide_x.dtype).mT


def _int8_product(x: Tensor | Codes, w: PackedWeight, *, asymmetric: bool) -> Tensor:
    """As `_packed_product`: int32 sums, from float products that are exact on any device, and then scaled."""
    if isinstance(x, Codes):
        code, scale = x.code, x.scale
    elif asymmetric:
        code, scale, zero = quantize_token_asym(x)
        code = code.int() - zero
    else:
        code, scale = quantize_token(x, "int8")
    total = torch.zeros(*x.shape[:-1], w.out_features, dtype=torch.int32, device=code.device)
    for i in range(0, w.in_features, EXACT_COLUMNS):
        at = slice(i, i + EXACT_COLUMNS)
        total = total + (code[..., at].float() @ w["weight"][..., at].float().mT).int()
    wide, by_row = wide_dtype(x.dtype), w["scale"] if w.num_experts is None else w["scale"][:, None]
    return total.to(wide) * scale.to(wide) * by_row.to(wide)


@op("gemm.grouped", weighted=True)
def grouped(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [S, in], w: [X, out, in], group_sizes: int32[X], bias: [X, out] -> [S, out].

    The first group_sizes[0] rows meet w[0], the next group_sizes[1] rows w[1], and so on; rows past the sum of the sizes give
    zeros. Every format, as `gemm.linear`. Sums in float32 or wider, adds the bias, rounds to x.dtype.

    A group is cut into tiles of equal height, so that shapes are static; each tile gathers its own expert, so that the work
    grows with the rows and the groups that have any, not with X.
    """
    num_experts = group_sizes.shape[0]
    height, num_tiles = _tiling(x.shape[0], num_experts, COPY_ROWS if w.fmt == "dense" else DEQUANTIZE_ROWS)
    tiles = (group_sizes + height - 1) // height
    first_tile, end_row = (tiles.cumsum(0) - tiles).int(), group_sizes.cumsum(0).int()
    tile = torch.arange(num_tiles, dtype=torch.int32, device=x.device)
    expert = ((tile[:, None] >= first_tile + tiles).sum(1)).clamp(max=num_experts - 1).int()
    inside = torch.arange(height, dtype=torch.int32, device=x.device)
    row = (end_row - group_sizes)[expert, None] + (tile - first_tile[expert])[:, None] * height + inside
    # What lies past a group's end is read as row 0, and written to one row past the end, which is cut off.
    row = torch.where(row < end_row[expert, None], row, x.shape[0])
    source = torch.where(row < x.shape[0], row, 0)
    out = x.new_zeros(x.shape[0] + 1, w.out_features)
    step = max(1, COPY_ELEMENTS // (w.out_features * w.in_features))
    for i in range(0, num_tiles, step):
        at = slice(i, i + step)
        y = _tile_product(x[source[at]], w.experts(expert[at]), None if bias is None else bias[expert[at], None])
        out.index_put_((row[at],), y)
    return out[:-1]


def _tile_product(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """x: [n, h, in], w: a stack of n, bias: [n, 1, out] -> [n, h, out] in x.dtype."""
    if w.fmt == "dense":
        weight = _dense_tensor(w).mT
        return x @ weight if bias is None else torch.baddbmm(bias, x, weight)
    y = _packed_product(x, w)
    return (y if bias is None else y + bias).to(x.dtype)


def _tiling(num_rows: int, num_experts: int, fetch_rows: int = COPY_ROWS) -> tuple[int, int]:
    """Height of the tiles, and how many there are at most: every group that has rows may end in a tile that is not full.

    Fetching an expert takes as long as multiplying `fetch_rows` rows by it.
    """

    def most(height: int) -> int:
        return (num_rows + min(num_rows, num_experts) * (height - 1)) // height

    height = min(TILE_ROWS, key=lambda height: most(height) * (fetch_rows + height))
    return height, most(height)


def _dense_tensor(w: PackedWeight) -> Tensor:
    assert w.fmt == "dense" and w.layout == "canonical", f"no reference body for {w.fmt}/{w.layout}"
    return w["weight"]
