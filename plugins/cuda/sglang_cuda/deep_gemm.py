"""DeepGEMM as a provider of its own, as facts: `--kernel gemm.linear=deep_gemm`. Imports neither it nor torch.

It compiles a kernel for each size of a weight with the nvcc that it finds, when a step first needs it: at start-up, in the batches that warm up.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_triton.gpu.kernels import BLOCK_SCALED, scaled, scaled_limits

from sglang_core.api import Kernel, SelectionContext
from sglang_cuda.linears import BLOCKS, architecture
from sglang_cuda.optional import problem

PACKAGE, RELEASES = "deep-gemm", ">=1.0,<1.1"
BETWEEN = 45  # above Triton's; below cuBLASLt's, which need no compiler on the machine


def kernels() -> list[Kernel]:
    missing = problem(PACKAGE, RELEASES)

    def supports(ctx: SelectionContext) -> str | None:
        return missing or limits(ctx)

    listed = scaled("sglang_cuda.deep_gemm_kernels:linear", supports, device=("cuda",), priority=BETWEEN)
    return [replace(kernel, provider="deep_gemm") for kernel in listed]


def limits(ctx: SelectionContext) -> str | None:
    if reason := scaled_limits(ctx, BLOCK_SCALED, rows=64, columns=128):
        return reason
    found = architecture(ctx)
    return None if found == BLOCKS else f"is for sm_{BLOCKS}; this is sm_{found}"
