"""Quantised weights and activations: what each format of `formats.py` means, number by number.

Everything here is float32, whatever the input, so that codes are the same in an oracle: a code is round-to-nearest-even of
x / scale (a true division), saturated. A scale is amax / the largest code; a row of zeros has scale 1. Scales of weights are
rounded to 16 significant bits, so that code * scale is exact in float32 and quantising a dequantised weight changes nothing; those of
int4 without zeros to bfloat16, as checkpoints have them: there are many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.ops.formats import BLOCK, Fmt
from sglang_core.ops.registry import op
from sglang_core.ops.weight import PackedWeight

FP8_MAX, INT8_MAX, E2M1_MAX = 448.0, 127.0, 6.0
E2M1_CUTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours; a tie goes to the even code
INT4_ZERO = 8


def pack4(codes: Tensor) -> Tensor:
    """codes: [..., n], integers in 0..15, n even -> uint8[..., n / 2], the even column in the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """packed: uint8[..., n] -> uint8[..., 2n] in 0..15. The inverse of `pack4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x: float32[...], scale broadcasts -> float8_e4m3fn[...], saturated at 448."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def to_int8(x: Tensor, scale: Tensor) -> Tensor:
    """x: float32[...], scale broadcasts -> int8[...] in +-127."""
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def to_e2m1(x: Tensor) -> Tensor:
    """x: float32[...] -> uint8[...] codes in 0..15, saturated at 6."""
    size, code = x.abs(), torch.zeros_like(x, dtype=torch.uint8)
    for i, cut in enumerate(E2M1_CUTS):
        code = code + (size >= cut if i % 2 else size > cut).to(torch.uint8)
    return code + (x < 0).to(torch.uint8) * 8


def from_e2m1(code: Tensor) -> Tensor:
    """code: uint8[...] in 0..15 -> float32[...]."""
    exponent, odd = (code.int() >> 1) & 3, code.int() & 1
    halves = torch.where(exponent == 0, odd, (2 + odd) << (exponent - 1).clamp(min=0))
    return torch.where(code < 8, halves, -halves).float() * 0.5


def from_e8m0(code: Tensor) -> Tensor:
    """code: uint8[...] -> float32[...], 2 ** (code - 127); 255 is NaN."""
    bits = code.int() << 23
    bits = torch.where(code == 0, 1 << 22, torch.where(code == 255, 0x7FC00000, bits))
    return bits.int().view(torch.float32)


def to_e8m0(amax: Tensor) -> Tensor:
    """amax: float32[...] of a group of e2m1 -> uint8[...]: the exponent of amax less 2, that of the largest e2m1."""
    exponent = torch.frexp(amax).exponent - 1
    return torch.where(amax == 0, 0, (exponent - 2 + 127).clamp(0, 254)).to(torch.uint8)


def spread(x: Tensor, columns: int, group: int) -> Tensor:
    """x: [..., ceil(columns / group)] -> [..., columns], each element `group` times; the last fewer."""
    return x.repeat_interleave(group, dim=-1)[..., :columns]


def group_amax(x: Tensor, group: int) -> Tensor:
    """x: [..., n] -> [..., ceil(n / group)], the largest magnitude of each group of columns; the last may be smaller."""
    return _grouped(x.abs(), group).amax(-1)


# ---- activations ----


def quantize_token(x: Tensor, kind: str = "fp8") -> tuple[Tensor, Tensor]:
    """x: [..., in] -> (float8_e4m3fn or int8[..., in], scale float32[..., 1]), `kind` "fp8" or "int8"."""
    x = x.float()
    if kind == "fp8":
        scale = _scale(x.abs().amax(-1, keepdim=True), FP8_MAX)
        return to_fp8(x, scale), scale
    assert kind == "int8", kind
    scale = _scale(x.abs().amax(-1, keepdim=True), INT8_MAX)
    return to_int8(x, scale), scale


def quantize_token_asym(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [..., in] -> (int8[..., in], scale float32[..., 1], zero int32[..., 1]); x is about (code - zero) * scale.

    The range includes 0, which is a code of its own: `zero`.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = _scale(high - low, 255.0)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    code = ((x / scale).round() + zero).clamp(-128, 127)
    return code.to(torch.int8), scale, zero.int()


def quantize_block(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """x: [..., in] -> (float8_e4m3fn[..., in], scale float32[..., ceil(in / block)])."""
    x = x.float()
    scale = _scale(group_amax(x, block), FP8_MAX)
    return to_fp8(x, spread(scale, x.shape[-1], block)), scale


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., in], global_scale: float32, broadcasts to [..., 1] -> (e2m1 codes uint8[..., in], scale float8_e4m3fn[..., in / 16]).

    A group's scale is amax / 6 / global_scale, in e4m3fn; where it is 0 all codes are 0.
    """
    x = x.float()
    scale = to_fp8(group_amax(x, 16) / E2M1_MAX, global_scale)
    whole = spread(scale.float() * global_scale, x.shape[-1], 16)
    return torch.where(whole == 0, 0, to_e2m1(x / torch.where(whole == 0, 1.0, whole))), scale


def quantized_activations(x: Tensor, fmt: Fmt, x_scale: Tensor | None = None) -> Tensor:
    """x: [..., in] -> float32[..., in] (float64 where x is): what is left of x once quantised as `fmt` says."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    match fmt.activation:
        case "as_is":
            return x.to(wide)
        case "fp8":
            code, scale = quantize_token(x, "fp8")
        case "fp8_static":
            assert x_scale is not None
            code, scale = to_fp8(x.float(), x_scale), x_scale
        case "fp8_block":
            code, scale = quantize_block(x)
            scale = spread(scale, x.shape[-1], BLOCK)
        case "int8":
            code, scale = quantize_token(x, "int8")
        case "int8_asym":
            code, scale, zero = quantize_token_asym(x)
            return (code.to(wide) - zero) * scale
        case "nvfp4" | "nvfp4_static":
            total = x_scale if fmt.static else None
            if total is None:
                assert not fmt.static
                total = _scale(x.float().abs().amax(-1, keepdim=True), E2M1_MAX * FP8_MAX)
            code, groups = quantize_nvfp4(x, total)
            code, scale = from_e2m1(code), spread(groups.to(wide) * total, x.shape[-1], 16)
    return code.to(wide) * scale.to(wide)


# ---- weights ----


@op("quant.quantize")
def quantize(w: Tensor, fmt: str, *, x_scale: Tensor | None = None) -> PackedWeight:
    """w: [out, in], or a stack [X, out, in] -> canonical tensors of `fmt`. Static formats need x_scale: float32[1] ([X, 1]).

    int4 with zero points: the range of a group, which includes 0, in 15 steps. Symmetric int4: codes in +-7. act_order puts
    columns into groups in their own order; a checkpoint brings a better one.
    """
    f, w, tensors = Fmt.parse(fmt), w if fmt == "dense" else w.float(), {}
    num_experts, columns = (w.shape[0] if w.ndim == 3 else None), w.shape[-1]
    group = columns if f.group == -1 else f.group
    match f.element:
        case "dense":
            tensors = {"weight": w}
        case "fp8" if group is not None:
            scale = _short_scale(_block_amax(w), FP8_MAX)
            tensors = {"weight": to_fp8(w, _spread_blocks(scale, w.shape[-2], columns)), "scale": scale}
        case "fp8" | "int8":
            dims = (-2, -1) if f.one_scale else (-1,)
            top = FP8_MAX if f.element == "fp8" else INT8_MAX
            scale = _short_scale(w.abs().amax(dims, keepdim=True), top).expand(*w.shape[:-1], 1)
            code = to_fp8(w, scale) if f.element == "fp8" else to_int8(w, scale)
            tensors = {"weight": code, "scale": scale[..., 0].contiguous()}
        case "int4":
            assert group is not None
            tensors = _quantize_int4(w, f, group)
        case "e2m1" if group == 32:
            scale = to_e8m0(group_amax(w, 32))
            tensors = {"weight": pack4(to_e2m1(w / spread(from_e8m0(scale), columns, 32))), "scale": scale}
        case "e2m1":
            total = _short_scale(w.abs().amax((-2, -1), keepdim=True), E2M1_MAX * FP8_MAX).expand(*w.shape[:-1], 1)
            code, scale = quantize_nvfp4(w, total)
            tensors = {"weight": pack4(code), "scale": scale, "global_scale": total[..., 0].contiguous()}
    if f.static:
        assert x_scale is not None, f"{fmt} needs x_scale"
        tensors["x_scale"] = x_scale
    return PackedWeight(fmt, tensors, out_features=w.shape[-2], in_features=columns, num_experts=num_experts)


@op("quant.dequantize", weighted=True)
def dequantize(w: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """A canonical weight -> [out, in] ([X, out, in]) in `dtype`, rounded once. float32 is exact if scales have 16 bits."""
    f = Fmt.parse(w.fmt)
    assert w.layout == "canonical", f"{w.layout} is a kernel's own layout: unpack it first"
    if f.is_dense:
        return w["weight"].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    code, scale, columns = w["weight"], w["scale"], w.in_features
    group = columns if f.group == -1 else f.group
    match f.element:
        case "fp8" if group is not None:
            value = code.to(wide) * _spread_blocks(scale, w.out_features, columns)
        case "fp8" | "int8":
            value = code.to(wide) * scale[..., None]
        case "int4":
            assert group is not None
            if f.act_order:
                at = w["group"][..., None, :].expand(*code.shape[:-1], columns).long()
                scale, zero = scale.gather(-1, at), w["zero"].gather(-1, at)
            else:
                scale = spread(scale, columns, group)
                zero = spread(w["zero"], columns, group) if f.has_zero else code.new_full((1,), INT4_ZERO)
            value = (unpack4(code).to(wide) - zero) * scale
        case "e2m1":
            scale = from_e8m0(scale) if group == 32 else scale.to(wide) * w["global_scale"][..., None]
            value = from_e2m1(unpack4(code)).to(wide) * spread(scale, columns, group or columns)
    return value.to(dtype)


def _quantize_int4(w: Tensor, f: Fmt, group: int) -> dict[str, Tensor]:
    columns, grouped = w.shape[-1], _grouped(w, group)
    if f.has_zero:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = _short_scale(high - low, 15.0)
        zero = (-low / scale).round().clamp(0, 15)
        tensors = {"scale": scale, "zero": zero.to(torch.uint8)}
    else:
        scale = _short_scale(grouped.abs().amax(-1), 7.0, bits=8)
        zero, tensors = torch.full_like(scale, INT4_ZERO), {"scale": scale}
    code = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).flatten(-2)[..., :columns]
    if f.act_order:
        own = (torch.arange(columns, dtype=torch.int32, device=w.device) // group).int()
        tensors["group"] = own.expand(*w.shape[:-2], columns).contiguous()
    return {"weight": pack4(code), **tensors}


def _block_amax(w: Tensor) -> Tensor:
    """w: [..., out, in] -> [..., ceil(out / 128), ceil(in / 128)]."""
    by_column = group_amax(w, BLOCK)
    return group_amax(by_column.transpose(-1, -2), BLOCK).transpose(-1, -2)


def _spread_blocks(scale: Tensor, rows: int, columns: int) -> Tensor:
    return spread(scale, columns, BLOCK).repeat_interleave(BLOCK, dim=-2)[..., :rows, :]


def _grouped(x: Tensor, group: int) -> Tensor:
    """x: [..., n] -> [..., ceil(n / group), group], filled up with zeros."""
    missing = -x.shape[-1] % group
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // group, group)


def _scale(amax: Tensor, top: float) -> Tensor:
    scale = amax / top
    return torch.where(scale == 0, 1.0, scale)


def _short_scale(amax: Tensor, top: float, *, bits: int = 16) -> Tensor:
    """`_scale` with so many significant bits."""
    dropped = 24 - bits
    scale = _scale(amax, top).contiguous().view(torch.int32)
    return ((scale + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)
