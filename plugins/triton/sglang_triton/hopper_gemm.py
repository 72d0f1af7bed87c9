"""gemm.linear in fp8 for Hopper: what the kernel of `hopper_gemm_kernels` is launched with. Of the provider `hopper`, for more than a few rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_core.api.ops import Codes, Fmt, PackedWeight
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention_plan import num_processors
from sglang_triton.gpu.linear import fp8_codes
from sglang_triton.hopper_gemm_kernels import HALF, HALVES, STEP, _linear_hopper
from sglang_triton.hopper_kernels import GROUPS, ROWS
from sglang_triton.packed import as_codes

TILE = (GROUPS.value * ROWS.value, HALVES.value * HALF.value)
STAGES = 4  # steps that are in shared memory at once: 192 of its 227 KiB
WARPS = 4  # of the first group; the launch adds the second's and the loader's
CODES = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULTS = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FP8 = torch.float8_e4m3fn


def linear(x: Tensor | Codes, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
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
    _linear_hopper[(min(num_tiles, num_processors(y.device)),)](
        boxes(code, ROWS.value, STEP.value, CODES),
        boxes(weight.view(FP8), HALF.value, STEP.value, CODES),
        boxes(rows, ROWS.value, HALF.value, RESULTS),
        x_scale, x_scale.stride(0), w_scale, w_scale.stride(0), w_scale if bias is None else bias,
        rows.shape[0], w.out_features, num_tiles,
        K=w.in_features, STAGES=STAGES, BLOCKS=blocks, HAS_BIAS=bias is not None, num_warps=WARPS,
    )  # fmt: skip
    return y


def boxes(x: Tensor, rows: int, columns: int, layout: NVMMASharedLayout) -> TensorDescriptor:
    """x: [n, m] as what TMA copies boxes of; a copy of x where its rows do not begin at multiples of 16 bytes."""
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def hopper_spec(fmt: str, *, bias: bool = False) -> AotSpec:
    """A weight of DeepSeek-V3's: 7168 to 16384."""
    box = f"{ROWS.value},{STEP.value}", f"{HALF.value},{STEP.value}", f"{ROWS.value},{HALF.value}"
    return AotSpec(
        op="gemm.linear",
        name=f"hopper, {fmt}{', bias' if bias else ''}",
        kernel=_linear_hopper,
        signature={
            "x_desc": f"tensordesc<fp8e4nv[{box[0]}],{CODES!r}>",
            "w_desc": f"tensordesc<fp8e4nv[{box[1]}],{CODES!r}>",
            "y_desc": f"tensordesc<bf16[{box[2]}],{RESULTS!r}>",
            **dict.fromkeys(("x_scale", "w_scale"), "*fp32"),
            "bias": "*bf16" if bias else "*fp32",
            **dict.fromkeys(("x_scale_row", "w_scale_row", "T", "N", "num_tiles"), "i32"),
        },
        constexprs={"K": 7168, "STAGES": STAGES, "BLOCKS": fmt == "fp8.block128", "HAS_BIAS": bias},
        fixed={"num_warps": WARPS},
        odd=("x_scale_row", "w_scale_row", "T", "num_tiles"),
        instructions={"sm_90": INSTRUCTIONS},
        archs=("sm_90",),
    )


INSTRUCTIONS = (
    "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
    "cp.async.bulk.tensor.2d.shared::",
    "cp.async.bulk.tensor.2d.global.shared::cta",
    "setmaxnreg",
    "mbarrier.try_wait",
)
AOT = (hopper_spec("fp8.block128"), hopper_spec("fp8.block128", bias=True), hopper_spec("fp8.token_channel"))
