"""What the core asks: the kernels, for every device that compiles or interprets Triton."""

from __future__ import annotations

from dataclasses import replace

from sglang_core.api import Kernel, KernelContext, hookimpl
from sglang_triton import pdl
from sglang_triton.kernels import DEVICES, KERNELS
from sglang_triton.tuning import arch_of, source


class TritonKernels:
    """The providers `triton`, `hopper` and `blackwell`. They offer nothing to other devices: what cannot run there would only lengthen their `explain`."""

    @hookimpl
    def sglang_kernels(self, ctx: KernelContext) -> list[Kernel]:
        family = ctx.device.path.split("/")[0]
        if family not in DEVICES:
            return []
        arch = arch_of(ctx.device.path)
        note = f"configs: {source(arch)}" + (", dependent launches" if pdl.taken(arch) else "")
        return [
            kernel if kernel.tune is None else replace(kernel, note=note)
            for kernel in KERNELS
            if family in kernel.device
        ]
