"""DeepGEMM as a provider of its own, as facts: `--kernel gemm.linear=deep_gemm`, `--kernel moe.fused=deep_gemm`. Imports neither it nor torch.

It compiles a kernel for each size of a weight with the nvcc that it finds, when a step first needs it: at start-up, in the batches that warm up, and later
for a batch of a size that it takes other tiles for. What it compiled stays on disk.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sglang_triton.gpu.kernels import BLOCK_SCALED, product_limits, scaled, scaled_limits
from sglang_triton.gpu.optional import problem
from sglang_triton.kernels import GRAPHS, TUNER

from sglang_core.api import Kernel, SelectionContext
from sglang_cuda.linears import BLOCKS, architecture

PACKAGE, RELEASES = "deep-gemm", ">=1.0,<1.1"
SOURCE = "https://github.com/deepseek-ai/DeepGEMM, cloned with its submodules"  # what PyPI has lacks its headers, and does not build
BETWEEN = 45  # above Triton's; below cuBLASLt's, which need no compiler on the machine
# Tokens up to which experts are Triton's, whose tiles have 16 rows and more: of 512 tokens that take 8 of 256 experts, each gets 16, and a block
# here has 128. An estimate; and decode steps have no more tokens.
FEW_BY_EXPERT = 512
UNIT = 128  # rows and columns of a weight that share a scale


def kernels() -> list[Kernel]:
    missing = problem(PACKAGE, RELEASES, SOURCE)

    def linear(ctx: SelectionContext) -> str | None:
        return missing or limits(ctx)

    def experts(ctx: SelectionContext) -> str | None:
        return missing or expert_limits(ctx)

    listed = scaled("sglang_cuda.deep_gemm_kernels:linear", linear, device=("cuda",), priority=BETWEEN)
    fused = partial(
        Kernel, "moe.fused", device=("cuda",), priority=BETWEEN, supports=experts, features=GRAPHS, provider="deep_gemm"
    )
    return [
        *(replace(kernel, provider="deep_gemm") for kernel in listed),
        fused(fn="sglang_triton.moe:fused", tokens=(1, FEW_BY_EXPERT), tune=TUNER),
        fused(fn="sglang_cuda.deep_gemm_experts:fused", tokens=(FEW_BY_EXPERT + 1, None)),
    ]


def limits(ctx: SelectionContext) -> str | None:
    return scaled_limits(ctx, BLOCK_SCALED, rows=64, columns=UNIT) or _device_limits(ctx)


def expert_limits(ctx: SelectionContext) -> str | None:
    """The products sum over M and over F, and a block of scales is to end where the gate rows do."""
    if reason := product_limits(ctx, BLOCK_SCALED):
        return reason
    if wrong := [f"{name}={ctx.site.dims[name]}" for name in ("M", "F") if ctx.site.dims[name] % UNIT]:
        return f"takes experts of multiples of {UNIT}, not {', '.join(wrong)}"
    return _device_limits(ctx)


def _device_limits(ctx: SelectionContext) -> str | None:
    found = architecture(ctx)
    return None if found == BLOCKS else f"is for sm_{BLOCKS}; this is sm_{found}"
