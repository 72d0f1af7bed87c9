"""`GpuRuntime`: streams, captured decode steps, memory and collectives of one GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_core.api import (
    Bucket,
    Communicator,
    LocalCommunicator,
    MemoryInfo,
    Pool,
    PoolSpec,
    RuntimeContext,
    StatePool,
    StatePoolSpec,
    Stream,
    TorchRuntime,
)
from sglang_triton.gpu.communicator import NcclCommunicator
from sglang_triton.gpu.driver import Driver
from sglang_triton.gpu.graphs import GraphedStep
from sglang_triton.gpu.pool import GpuPool, GpuStatePool
from sglang_triton.gpu.stream import GpuStream

MAX_GRAPHED_REQS = 512  # in a longer step the kernels outlast the host's launching of them


class GpuRuntime(TorchRuntime):
    """Decode steps are padded to buckets and replayed as graphs; prefills run in their own shapes, kernel by kernel.

    Where every op is watched (`ctx.watched`) there are no buckets and no graphs: a replay calls no op.
    """

    takes_exact_shapes = True

    def __init__(self, ctx: RuntimeContext, driver: Driver) -> None:
        driver.bind()
        super().__init__(ctx, driver.device)
        self._driver = driver

    def memory(self) -> MemoryInfo:
        free, total = self._driver.memory()
        return MemoryInfo(total=total, free=free)

    def num_allocations(self) -> int | None:
        return self._driver.num_allocations()

    def synchronize(self) -> None:
        self._driver.synchronize()

    def stream(self) -> Stream:
        return GpuStream(self._driver)

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        """Decode steps, the largest first: graphs share their memory, and what the first one takes is enough for all."""
        if self.ctx.watched:
            return ()
        return [
            Bucket(num_tokens=size, num_reqs=size, max_extend=1, num_pages=max_num_pages)
            for size in reversed(batch_sizes(min(max_num_reqs, MAX_GRAPHED_REQS)))
        ]

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        if not buckets:
            return super().compile_step(fn, state, buckets)
        return GraphedStep(fn, state, self._driver, len(buckets))

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        self._refuse_layout(spec.layout, GpuPool.layout)
        return GpuPool(spec, num_pages, self.torch_device)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, GpuStatePool.layout)
        return GpuStatePool(spec, num_slots, self.torch_device)

    def time_calls(self, call: Callable[[], object], *, repeats: int, replayed: bool = False) -> list[float]:
        """By events on a stream of its own; a graph safe call as a graph, so that launches do not count."""
        self._driver.synchronize()  # operands were made on another stream
        stream = self._driver.new_stream()
        with self._driver.on(stream):
            if not replayed:
                return self._driver.seconds(call, repeats)
            graph, _ = self._driver.capture(call)
            return self._driver.seconds(graph.replay, repeats)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        timeout = timedelta(seconds=self.ctx.dist_timeout)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl",  # RCCL, in AMD's build
                store=store,
                rank=self.ctx.rank,
                world_size=self.ctx.world_size,
                timeout=timeout,
                device_id=self.torch_device,
            )
        return NcclCommunicator(dist.new_group(list(ranks), timeout=timeout), ranks, rank)

    def alloc_packed(self, num_bytes: int) -> torch.Tensor:
        """Pinned, so that the copy to the GPU needs no other."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.torch_device.type == "cuda")


def batch_sizes(largest: int) -> list[int]:
    """Sizes that a decode step is padded to: close together where steps are short, and never more than an eighth too long."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size += max(1, 1 << max(0, size.bit_length() - 4))
    return [*sizes, largest]
