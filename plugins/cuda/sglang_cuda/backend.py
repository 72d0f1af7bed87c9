"""`CudaBackend`: NVIDIA GPUs from Ampere on. Importing it opens no device and imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_triton.gpu.backend import GpuBackend

from sglang_core.api import DefaultsContext, DeviceInfo, DeviceRuntime, Kernel, KernelContext, RuntimeContext
from sglang_cuda import deep_gemm, flash_attn, flashinfer, linears, nvml, sgl_kernel
from sglang_cuda.notes import notes

OLDEST = (8, 0)  # bfloat16 in the tensor cores
LARGE = 60 * 2**30  # bytes


class CudaBackend(GpuBackend):
    """A device for each GPU that CUDA_VISIBLE_DEVICES leaves."""

    name = "cuda"
    platform = "CUDA"
    install = "pip install --force-reinstall torch: what PyPI has for Linux is built for CUDA"

    def takes_build(self, build: str) -> bool:
        return not build.startswith(("cpu", "rocm", "xpu"))

    def probe(self) -> list[DeviceInfo]:
        machine = nvml.read()
        if machine is None:
            return []
        versions = {"driver": machine.driver, "cuda": machine.cuda}
        gpus = nvml.visible(machine.gpus)
        return [replace(self._info(i, gpu, versions), notes=notes(len(gpus))) for i, gpu in enumerate(gpus)]

    def _info(self, index: int, gpu: nvml.Gpu, versions: dict[str, str]) -> DeviceInfo:
        major, minor = gpu.compute_capability
        problem = self.wrong_packages()
        if gpu.compute_capability < OLDEST:
            problem = f"kernels are for compute capability {OLDEST[0]}.{OLDEST[1]} and later, and this has {major}.{minor}; take --device cpu"
        return DeviceInfo(
            backend=self.name,
            index=index,
            path=f"cuda/sm_{major}{minor}",
            name=gpu.name,
            score=200 + major,
            total_memory=gpu.total_memory,
            facts={"uuid": gpu.uuid, "nvlinks": gpu.num_nvlinks},
            versions=versions,
            problem=problem,
        )

    def absent_reason(self) -> str:
        machine = nvml.read()
        if machine is None:
            return "no NVIDIA driver answers: install it, or give the container its GPUs (docker run --gpus all)"
        if machine.gpus:
            return (
                f"CUDA_VISIBLE_DEVICES leaves none of the {len(machine.gpus)} GPUs here; unset it, or list one of them"
            )
        return "the NVIDIA driver finds no GPU"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_triton.gpu.driver import GpuDriver  # torch: not needed to list devices

        from sglang_cuda.runtime import CudaRuntime

        return CudaRuntime(ctx, GpuDriver(ctx.devices[0].index))

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        optional = [k for module in (flashinfer, sgl_kernel, flash_attn, deep_gemm) for k in module.kernels()]
        return [*super().kernels(ctx), *linears.kernels(), *optional]

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """On a small GPU the activations of long chunks are a matter."""
        small = {} if ctx.device.total_memory >= LARGE else {"chunked_prefill_size": 2048}
        return super().config_defaults(ctx) | small
