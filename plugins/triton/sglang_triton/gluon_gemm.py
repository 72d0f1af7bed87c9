"""gemm.linear in fp8 by kernels of our own in Gluon: how those of `hopper_gemm` and `blackwell_gemm` are launched, and compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_core.api.ops import Codes, Fmt, PackedWeight
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention_plan import num_processors
from sglang_triton.gpu.linear import fp8_codes
from sglang_triton.hopper_gemm_kernels import HALF, HALVES
from sglang_triton.hopper_kernels import GROUPS, ROWS
from sglang_triton.packed import as_codes

TILE = (GROUPS.value * ROWS.value, HALVES.value * HALF.value)  # rows and columns of a program's; `place` has them too
STAGES = 4  # steps that are in shared memory at once: 192 of its 227 KiB
WARPS = 4  # of the first group; the launch adds the second's and the others'
CODES = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULTS = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FP8 = torch.float8_e4m3fn
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What sets an architecture's kernel apart: rows and columns of what TMA copies at once."""

    arch: str
    name: str  # of the provider
    x: Shape
    w: Shape
    y: Shape
    instructions: tuple[str, ...]  # that its assembly must have


def multiply(kernel: Any, form: Form, x: Tensor | Codes, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """x: [..., in], perhaps quantised already, w: [out, in] in fp8.block128, token_channel or tensor, bias: [out] -> [..., out].

    in a multiple of 16 and out of 8: rows of 16 bytes, as TMA copies them.
    """
    blocks = Fmt.parse(w.fmt).activation == "fp8_block"
    weight, w_scale, _ = as_codes(w)
    y = torch.empty(*x.shape[:-1], w.out_features, dtype=x.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    code, x_scale = fp8_codes(x, "fp8_block" if blocks else "fp8")
    rows = y.view(-1, w.out_features)
    num_tiles = triton.cdiv(rows.shape[0], TILE[0]) * triton.cdiv(w.out_features, TILE[1])
    kernel[(min(num_tiles, num_processors(y.device)),)](
        boxes(code, form.x, CODES), boxes(weight.view(FP8), form.w, CODES), boxes(rows, form.y, RESULTS),
        x_scale, x_scale.stride(0), w_scale, w_scale.stride(0), w_scale if bias is None else bias,
        rows.shape[0], w.out_features, num_tiles,
        K=w.in_features, STAGES=STAGES, BLOCKS=blocks, HAS_BIAS=bias is not None, num_warps=WARPS,
    )  # fmt: skip
    return y


def boxes(x: Tensor, shape: Shape, layout: NVMMASharedLayout) -> TensorDescriptor:
    """x: [n, m] as what TMA copies boxes of; a copy of x where its rows do not begin at multiples of 16 bytes."""
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, list(shape), layout)


def form_specs(kernel: Any, form: Form) -> tuple[AotSpec, ...]:
    return (
        spec(kernel, form, "fp8.block128"),
        spec(kernel, form, "fp8.block128", bias=True),
        spec(kernel, form, "fp8.token_channel"),
    )


def spec(kernel: Any, form: Form, fmt: str, *, bias: bool = False) -> AotSpec:
    """A weight of DeepSeek-V3's: 7168 to 16384."""
    x, w, y = (",".join(map(str, shape)) for shape in (form.x, form.w, form.y))
    return AotSpec(
        op="gemm.linear",
        name=f"{form.name}, {fmt}{', bias' if bias else ''}",
        kernel=kernel,
        signature={
            "x_desc": f"tensordesc<fp8e4nv[{x}],{CODES!r}>",
            "w_desc": f"tensordesc<fp8e4nv[{w}],{CODES!r}>",
            "y_desc": f"tensordesc<bf16[{y}],{RESULTS!r}>",
            **dict.fromkeys(("x_scale", "w_scale"), "*fp32"),
            "bias": "*bf16" if bias else "*fp32",
            **dict.fromkeys(("x_scale_row", "w_scale_row", "T", "N", "num_tiles"), "i32"),
        },
        constexprs={"K": 7168, "STAGES": STAGES, "BLOCKS": fmt == "fp8.block128", "HAS_BIAS": bias},
        fixed={"num_warps": WARPS},
        odd=("x_scale_row", "w_scale_row", "T", "num_tiles"),
        instructions={form.arch: form.instructions},
        archs=(form.arch,),
    )
