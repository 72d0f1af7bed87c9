"""`RocmBackend`: AMD Instinct GPUs of CDNA 3 and 4. Importing it opens no device and imports no torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_triton.gpu.claims import claims

from sglang_core.api import (
    Backend,
    Claims,
    DefaultsContext,
    DeviceInfo,
    DeviceRuntime,
    KernelContext,
    RuntimeContext,
)
from sglang_rocm import kfd

TARGETS = {"gfx942": 3, "gfx950": 4}  # -> CDNA generation
INSTALL = "pip install --force-reinstall torch from the ROCm index that https://pytorch.org/get-started/locally names"


class RocmBackend(Backend):
    """A device for each GPU that the VISIBLE_DEVICES variables leave. Kernels come from the provider `triton`; other ops run their body."""

    name = "rocm"
    sys = Path("/sys")

    def probe(self) -> list[DeviceInfo]:
        versions = {"driver": kfd.driver_version(self.sys)}
        return [self._info(i, gpu, versions) for i, gpu in enumerate(kfd.visible(kfd.read(self.sys)))]

    def _info(self, index: int, gpu: kfd.Gpu, versions: dict[str, str]) -> DeviceInfo:
        problem = wrong_torch()
        if gpu.target not in TARGETS:
            problem = f"kernels are for {' and '.join(TARGETS)}, and this is {gpu.target}; take --device cpu"
        return DeviceInfo(
            backend=self.name,
            index=index,
            path=f"rocm/{gpu.target}",
            name=gpu.name,
            score=200 + TARGETS.get(gpu.target, 0),
            total_memory=gpu.total_memory,
            facts={"uuid": gpu.uuid, "links": gpu.num_links},
            versions=versions,
            problem=problem,
        )

    def absent_reason(self) -> str:
        found = kfd.read(self.sys)
        if found:
            return f"ROCR_, HIP_ or CUDA_VISIBLE_DEVICES leaves none of the {len(found)} GPUs here; unset it, or list one of them"
        return "the amdgpu driver lists no GPU: load it, or give the container its devices (--device /dev/kfd --device /dev/dri)"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_triton.gpu.driver import TorchDriver  # torch: not needed to list devices
        from sglang_triton.gpu.runtime import GpuRuntime

        return GpuRuntime(ctx, TorchDriver(ctx.devices[0].index))

    def claims(self, ctx: KernelContext) -> Claims:
        return claims()

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        return {"dtype": "bfloat16", "page_size": 16, "chunked_prefill_size": 8192}


def wrong_torch() -> str:
    """What is wrong with the PyTorch installed, by its version alone: "" or a sentence that says what to install."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return f"PyTorch is not installed; {INSTALL}"
    if not installed.partition("+")[2].startswith("rocm"):
        return f"PyTorch {installed} is not built for ROCm; {INSTALL}"
    return ""
