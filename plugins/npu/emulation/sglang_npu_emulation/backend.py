"""`EmulatedNpuBackend`: sglang-npu, all of it, on torch_npu's ops with bodies for the host. Importing it imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from sglang_npu.backend import NpuBackend

from sglang_core.api import Claims, DeviceInfo, DeviceRuntime, Kernel, KernelContext, RuntimeContext
from sglang_npu_emulation import stubs

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class EmulatedNpuBackend(NpuBackend):
    """One device, for tests: `--device npu_emulated`."""

    name = "npu_emulated"

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return True

    def probe(self) -> list[DeviceInfo]:
        try:
            versions = {"torch_npu": version("torch_npu")}
        except PackageNotFoundError:
            return []
        problem = ""
        if not any(stubs.FOLDER.glob("*.so")):
            problem = f"there are no libraries in place of Ascend's driver; generate them: {stubs.HOW}"
        if os.environ.get(AUTOLOAD) != "0":
            problem = f"set {AUTOLOAD}=0: PyTorch would load torch_npu before there is something in its driver's place"
        return [
            DeviceInfo(
                backend=self.name,
                path="npu/emulated",
                name="the host, through torch_npu's schemas",
                score=-1,
                total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                facts={"emulated": True},
                versions=versions,
                problem=problem,
            )
        ]

    def absent_reason(self) -> str:
        return "torch_npu is not installed: pip install ./plugins/npu/emulation brings it"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_npu_emulation.runtime import EmulatedRuntime  # torch

        return EmulatedRuntime(ctx)

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        """Those of the NPU, under this backend's name. Their modules import torch_npu, which wants something in its driver's place first."""
        from sglang_npu_emulation.ops import load  # torch

        load()
        return [replace(kernel, provider=kernel.provider or self.name) for kernel in super().kernels(ctx)]

    def claims(self, ctx: KernelContext) -> Claims:
        """And collectives, which are gloo's here: of HCCL's nothing is stated."""
        claims = super().claims(ctx)
        return replace(claims, profiles=(*claims.profiles, "comm"))
