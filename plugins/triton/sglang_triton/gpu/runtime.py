"""`GpuRuntime`: streams, captured steps, memory and collectives of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_core.api import CapturedRuntime, Pool, PoolSpec, StatePool, StatePoolSpec
from sglang_triton.gpu.driver import Driver
from sglang_triton.gpu.pool import GpuPool, GpuStatePool


class GpuRuntime(CapturedRuntime[Driver]):
    """Pools in the layouts that kernels read, and the time that a call takes."""

    collectives = "nccl"  # RCCL, in AMD's build
    most_captured_reqs = 512
    captures_prefills = True

    def batch_sizes(self, largest: int) -> list[int]:
        return batch_sizes(largest)

    def token_sizes(self, largest: int) -> list[int]:
        return token_sizes(largest)

    def group_options(self) -> dict[str, Any]:
        return {"device_id": self.torch_device}

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        self._refuse_layout(spec.layout, GpuPool.layout)
        return GpuPool(spec, num_pages, self.torch_device)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, GpuStatePool.layout)
        return GpuStatePool(spec, num_slots, self.torch_device)

    def time_calls(self, call: Callable[[], object], *, repeats: int, replayed: bool = False) -> list[float]:
        """By events on a stream of its own; a graph safe call as a graph, so that launches do not count."""
        self.synchronize()  # operands were made on another stream
        with self.driver.on(self.driver.new_stream()):
            if not replayed:
                return self.driver.seconds(call, repeats)
            graph, _ = self.driver.capture(call)
            return self.driver.seconds(graph.replay, repeats)


def batch_sizes(largest: int) -> list[int]:
    """Sizes that a decode step is padded to: close together where steps are short, and never more than an eighth too long."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size += max(1, 1 << max(0, size.bit_length() - 4))
    return [*sizes, largest]


def token_sizes(largest: int) -> list[int]:
    """Sizes that a step with prefills is padded to: as tiles of products have rows where reading the weights is what takes time, then an eighth apart."""
    sizes, size = [], 16
    while size < largest:
        sizes.append(size)
        size += max(min(size, 32), 1 << (size.bit_length() - 4))
    return [*sizes, largest]
