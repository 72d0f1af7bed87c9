"""`TpuBackend`: Google TPUs, and the host CPU as JAX sees it. Importing it imports neither jax nor torch."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_core.api import (
    Backend,
    Claims,
    DefaultsContext,
    DeviceInfo,
    DeviceRuntime,
    Kernel,
    KernelContext,
    RuntimeContext,
)
from sglang_tpu.kernels import KERNELS, claims

PROFILES = ("base", "odd_sizes", "graph")


class TpuBackend(Backend):
    """`tpu:cpu` is the host through XLA's CPU compiler: every step as on a TPU, for tests."""

    name = "tpu"

    def probe(self) -> list[DeviceInfo]:
        try:
            versions = {"jax": version("jax"), "torchax": version("torchax")}
        except PackageNotFoundError:
            return []
        return [
            DeviceInfo(
                backend=self.name,
                path="tpu/cpu",
                name="the host, compiled by XLA",
                score=-1,
                total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                facts={"emulated": True},
                versions=versions,
            )
        ]

    def absent_reason(self) -> str:
        return "jax or torchax is not installed: pip install sglang-tpu brings both"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        import jax

        from sglang_tpu.runtime import TpuRuntime

        return TpuRuntime(ctx, jax.devices("cpu")[ctx.devices[0].index])

    def claims(self, ctx: KernelContext) -> Claims:
        return claims(PROFILES)

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return KERNELS

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        return {"page_size": 16}
