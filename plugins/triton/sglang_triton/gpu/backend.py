"""`GpuBackend`: what the backends of NVIDIA and AMD GPUs share. Importing it opens no device and imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from sglang_core.api import Backend, Claims, DefaultsContext, DeviceRuntime, Kernel, KernelContext, RuntimeContext
from sglang_triton import compiler
from sglang_triton.gpu import kernels
from sglang_triton.kernels import claims

# Up to about here a step waits for the weights, and padding is free; beyond, its products take longer than launching them.
PREFILL_GRAPH_TOKENS = 256
PROFILES = ("base", "graph", "comm", "e2e")  # of the device; what its kernels do is the provider's to state


class GpuBackend(Backend):
    """A device for each GPU. Linear layers are those of the libraries in PyTorch, other kernels the provider `triton`'s; other ops run their body."""

    platform: ClassVar[str]  # what PyTorch must be built for
    install: ClassVar[str]  # what brings such a PyTorch

    @abstractmethod
    def takes_build(self, build: str) -> bool:
        """`build`: what follows the + in PyTorch's version, "" in the one on PyPI."""

    def wrong_packages(self) -> str:
        """What is wrong with the PyTorch or the Triton installed, by their versions alone: "" or a sentence that says what to install."""
        try:
            installed = version("torch")
        except PackageNotFoundError:
            return f"PyTorch is not installed; {self.install}"
        if self.takes_build(installed.partition("+")[2]):
            return compiler.problem(self.install)
        return f"PyTorch {installed} is not built for {self.platform}; {self.install}"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_triton.gpu.driver import GpuDriver  # torch: not needed to list devices
        from sglang_triton.gpu.runtime import GpuRuntime

        return GpuRuntime(ctx, GpuDriver(ctx.devices[0].index))

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return [kernels.dense(), *kernels.streamed()]

    def claims(self, ctx: KernelContext) -> Claims:
        return claims(PROFILES)

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """Long chunks keep a GPU busy in a prefill."""
        return {
            "dtype": "bfloat16",
            "page_size": 16,
            "chunked_prefill_size": 8192,
            "prefill_graph_tokens": PREFILL_GRAPH_TOKENS,
        }
