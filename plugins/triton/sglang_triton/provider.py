"""What the core asks: the kernels, for every device that compiles or interprets Triton."""

from __future__ import annotations

from sglang_core.api import Kernel, KernelContext, hookimpl
from sglang_triton.kernels import KERNELS


class TritonKernels:
    """The provider `triton`. Which devices a kernel is for stands in the kernel."""

    @hookimpl
    def sglang_kernels(self, ctx: KernelContext) -> list[Kernel]:
        return list(KERNELS)
