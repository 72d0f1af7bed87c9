"""A backend of GPUs whose driver is the host."""

from __future__ import annotations

from sglang_triton.gpu.backend import PROFILES
from sglang_triton.gpu.runtime import GpuRuntime

from sglang_core.api import (
    Claims,
    DeviceInfo,
    DeviceRuntime,
    KernelContext,
    Pool,
    PoolSpec,
    RuntimeContext,
    TorchBackend,
)
from tests.backend.fake_driver import FakeDriver


class FakeGpuRuntime(GpuRuntime):
    """Its pools are there to be looked at."""

    def __init__(self, ctx: RuntimeContext, driver: FakeDriver) -> None:
        super().__init__(ctx, driver)
        self.pools: list[Pool] = []

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        self.pools.append(super().alloc_pool(spec, num_pages))
        return self.pools[-1]


class FakeGpuBackend(TorchBackend):
    """Ops run their bodies."""

    name = "fakegpu"
    runtimes: list[FakeGpuRuntime] = []

    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend=self.name, path=self.name, name="the host", score=-2, versions={"driver": "1"})]

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        self.runtimes.append(FakeGpuRuntime(ctx, FakeDriver()))
        return self.runtimes[-1]

    def claims(self, ctx: KernelContext) -> Claims:
        return Claims(profiles=PROFILES)
