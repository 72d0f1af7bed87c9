"""`RocmBackend`: AMD Instinct GPUs of CDNA 3 and 4. Importing it opens no device and imports no torch."""

from __future__ import annotations

from pathlib import Path

from sglang_triton.gpu.backend import GpuBackend
from sglang_triton.gpu.optional import provider_note

from sglang_core.api import DeviceInfo, Kernel, KernelContext
from sglang_rocm import aiter, kfd, linears

TARGETS = {"gfx942": 3, "gfx950": 4}  # -> CDNA generation


class RocmBackend(GpuBackend):
    """A device for each GPU that the VISIBLE_DEVICES variables leave."""

    name = "rocm"
    platform = "ROCm"
    install = (
        "pip install --force-reinstall torch from the ROCm index that https://pytorch.org/get-started/locally names"
    )
    sys = Path("/sys")

    def takes_build(self, build: str) -> bool:
        return build.startswith("rocm")

    def probe(self) -> list[DeviceInfo]:
        versions = {"driver": kfd.driver_version(self.sys)}
        return [self._info(i, gpu, versions) for i, gpu in enumerate(kfd.visible(kfd.read(self.sys)))]

    def _info(self, index: int, gpu: kfd.Gpu, versions: dict[str, str]) -> DeviceInfo:
        problem = self.wrong_packages()
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
            notes=(provider_note("aiter", aiter.missing()),),
        )

    def absent_reason(self) -> str:
        found = kfd.read(self.sys)
        if found:
            return f"ROCR_, HIP_ or CUDA_VISIBLE_DEVICES leaves none of the {len(found)} GPUs here; unset it, or list one of them"
        return "the amdgpu driver lists no GPU: load it, or give the container its devices (--device /dev/kfd --device /dev/dri)"

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return [*super().kernels(ctx), *linears.kernels(ctx.device.path), *aiter.kernels()]
