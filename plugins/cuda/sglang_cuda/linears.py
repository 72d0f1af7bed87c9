"""Linear layers in fp8 by cuBLASLt, as facts: which GPU and which PyTorch take which. Imports no torch."""

from __future__ import annotations

from sglang_triton.gpu.kernels import BLOCK_SCALED, ROW_SCALED, STATIC, cuda_of_torch, scaled, scaled_limits, static

from sglang_core.api import Kernel, SelectionContext

PRODUCTS = "sglang_triton.gpu.linear"
FIRST_FP8 = 89  # Ada
BLOCKS = 90  # cuBLASLt multiplies by blocks of 128 on Hopper alone
FIRST_BLOCKS = 129  # and from CUDA 12.9 on


def kernels() -> list[Kernel]:
    return [
        *scaled(f"{PRODUCTS}:row_scaled", row_limits),
        *scaled(f"{PRODUCTS}:block_scaled", block_limits),
        static(f"{PRODUCTS}:static_scaled", static_limits),
    ]


def architecture(ctx: SelectionContext) -> int:
    """ "cuda/sm_90" -> 90."""
    return int(ctx.device.path.partition("sm_")[2])


def row_limits(ctx: SelectionContext) -> str | None:
    return scaled_limits(ctx, ROW_SCALED) or _fp8_limits(ctx)


def static_limits(ctx: SelectionContext) -> str | None:
    return scaled_limits(ctx, STATIC) or _fp8_limits(ctx)


def _fp8_limits(ctx: SelectionContext) -> str | None:
    found = architecture(ctx)
    return None if found >= FIRST_FP8 else f"fp8 is in the tensor cores from sm_{FIRST_FP8} on; this is sm_{found}"


def block_limits(ctx: SelectionContext) -> str | None:
    # Columns: by_blocks says why.
    if reason := scaled_limits(ctx, BLOCK_SCALED, rows=128, columns=512):
        return reason
    if (found := architecture(ctx)) != BLOCKS:
        return f"cuBLASLt multiplies by blocks on sm_{BLOCKS} alone; this is sm_{found}"
    if (cuda := cuda_of_torch()) is not None and cuda < FIRST_BLOCKS:
        return f"cuBLASLt multiplies by blocks from CUDA {FIRST_BLOCKS / 10} on; this PyTorch is built for {cuda / 10}"
    return None
