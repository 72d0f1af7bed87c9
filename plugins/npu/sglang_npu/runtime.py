"""`NpuRuntime`: streams, captured decode steps, memory and collectives of one NPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_core.api import CapturedRuntime, DeviceGraph, Pool, PoolSpec
from sglang_npu import graphs
from sglang_npu.driver import Driver
from sglang_npu.pools import CodedPool, LatentPool, NpuPool


class NpuRuntime(CapturedRuntime[Driver]):
    """Pools in the layouts that the vendor's ops read, and graphs that are told lengths."""

    collectives = "hccl"
    most_captured_reqs = 256

    def batch_sizes(self, largest: int) -> list[int]:
        return batch_sizes(largest)

    def capture(self, fn: Callable[[], Any]) -> tuple[DeviceGraph, Any]:
        return graphs.capture(self.driver, fn)

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        made = {pool.layout: pool for pool in (LatentPool, CodedPool)}.get(spec.layout, NpuPool)
        self._refuse_layout(spec.layout, made.layout)
        return made(spec, num_pages, self.torch_device)


def batch_sizes(largest: int) -> list[int]:
    """Sizes that a decode step is padded to: 1, 2, 4, and then multiples of 8, an eighth too long at most where that is more."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size = size * 2 if size < 8 else size + max(8, 1 << (size.bit_length() - 3))
    return [*sizes, largest]
