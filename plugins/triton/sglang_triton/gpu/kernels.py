"""Linear layers by the libraries that come with PyTorch (cuBLASLt, hipBLASLt), as facts. Imports no torch.

A backend lists them as its own. Products of fp8 are for many rows: with few, a step streams weights, which a kernel of ours does on the same codes
as fast as any, without padding rows to a tile. So each is a pair of variants, of which the first is Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from sglang_core.api import Kernel, SelectionContext
from sglang_triton.kernels import FEW, GRAPHS, TUNER, UNPROVEN, dtype_limits

Supports = Callable[[SelectionContext], str | None]

ROW_SCALED = ("fp8.tensor", "fp8.token_channel")
STATIC = ("fp8.tensor.static",)
BLOCK_SCALED = ("fp8.block128",)
STREAMED = 16  # rows of a tile of the tensor cores: with more, libraries lose nothing to padding


def dense() -> Kernel:
    """F.linear, which is the op's body too: named here as what it is, the device's own."""
    return _kernel("sglang_triton.gpu.linear:dense", supports=dense_limits)


def streamed() -> list[Kernel]:
    """Dense weights by Triton's kernel where a step waits for them: its programs fetch them while the kernel ahead ends (`pdl`), as no library's do."""
    facts: dict[str, Any] = {"provider": "streamed", "priority": UNPROVEN, "supports": dense_limits}
    few = _kernel("sglang_triton.gemm:linear", tokens=(1, STREAMED), tune=TUNER, **facts)
    return [few, _kernel("sglang_triton.gpu.linear:dense", tokens=(STREAMED + 1, None), **facts)]


def scaled(fn: str, supports: Supports, **facts: Any) -> list[Kernel]:
    """`fn` for many rows, Triton's for few. Facts are of both: variants share one packing."""
    facts = {"features": GRAPHS | {"takes_codes"}} | facts
    few = _kernel("sglang_triton.gemm:linear", supports=supports, tokens=(1, FEW), tune=TUNER, **facts)
    return [few, _kernel(fn, supports=supports, tokens=(FEW + 1, None), **facts)]


def static(fn: str, supports: Supports, **facts: Any) -> Kernel:
    """`fn` for any number of rows: Triton knows no activations with a scale of the checkpoint."""
    return _kernel(fn, supports=supports, **facts)


def _kernel(fn: str, **facts: Any) -> Kernel:
    return Kernel("gemm.linear", fn=fn, **({"device": ("cuda", "rocm"), "features": GRAPHS} | facts))


def dense_limits(ctx: SelectionContext) -> str | None:
    return dtype_limits(ctx) if ctx.site.fmt == "dense" else f"takes dense weights, not {ctx.site.fmt}"


def scaled_limits(ctx: SelectionContext, formats: tuple[str, ...], *, rows: int = 16, columns: int = 16) -> str | None:
    """What torch's scaled products take of a weight, [rows, columns]."""
    if reason := product_limits(ctx, formats):
        return reason
    held = {"out": rows, "in": columns}
    if wrong := [
        f"{name}={ctx.site.dims.get(name)}" for name, unit in held.items() if ctx.site.dims.get(name, 1) % unit
    ]:
        return f"takes matrices of {rows} x {columns} elements or multiples, not {', '.join(wrong)}"
    return None


def product_limits(ctx: SelectionContext, formats: tuple[str, ...]) -> str | None:
    """Of any scaled product: their results are bfloat16."""
    if ctx.site.fmt not in formats:
        return f"takes weights in {', '.join(formats)}, not {ctx.site.fmt}"
    return None if ctx.site.dtype == "bfloat16" else f"gives bfloat16, not {ctx.site.dtype}"


def cuda_of_torch() -> int | None:
    """126 where PyTorch says in its version that it was built for CUDA 12.6; None where it does not."""
    build = version("torch").partition("+")[2]
    return int(build[2:]) if build.startswith("cu") and build[2:].isdigit() else None
