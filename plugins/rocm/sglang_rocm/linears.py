"""Linear layers in fp8 by hipBLASLt, as facts. Imports no torch.

CDNA 4 has the fp8 of the Open Compute Project, which is what checkpoints have; CDNA 3 has one of its own (`fnuz.py`). Products by blocks of 128
are Triton's on both.
"""

from __future__ import annotations

from sglang_triton.gpu.kernels import ROW_SCALED, STATIC, scaled, scaled_limits, static

from sglang_core.api import Kernel, SelectionContext

FNUZ = "rocm/gfx942"
PACKING = {"pack": "sglang_rocm.fnuz:pack", "unpack": "sglang_rocm.fnuz:unpack", "packed_layout": "rocm.fnuz/1"}


def kernels(path: str) -> list[Kernel]:
    """Of the device at `path`: "rocm/gfx942" or another."""
    module, packing = ("sglang_rocm.fnuz", PACKING) if path == FNUZ else ("sglang_triton.gpu.linear", {})
    return [
        *scaled(f"{module}:row_scaled", row_limits, **packing),
        static(f"{module}:static_scaled", static_limits, **packing),
    ]


def row_limits(ctx: SelectionContext) -> str | None:
    return scaled_limits(ctx, ROW_SCALED)


def static_limits(ctx: SelectionContext) -> str | None:
    return scaled_limits(ctx, STATIC)
