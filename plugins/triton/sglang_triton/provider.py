"""What the core asks: the kernels, for every device that compiles or interprets Triton."""

from __future__ import annotations

from sglang_core.api import Kernel, KernelContext, hookimpl
from sglang_triton.kernels import DEVICES, KERNELS


class TritonKernels:
    """The provider `triton`. It offers nothing to other devices: what cannot run there would only lengthen their `explain`."""

    @hookimpl
    def sglang_kernels(self, ctx: KernelContext) -> list[Kernel]:
        return list(KERNELS) if ctx.device.path.split("/")[0] in DEVICES else []
