"""`NpuRuntime`: streams, captured decode steps, memory and collectives of one NPU."""

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
    Stream,
    TorchRuntime,
)
from sglang_npu.communicator import HcclCommunicator
from sglang_npu.driver import Driver
from sglang_npu.graphs import GraphedStep
from sglang_npu.pools import LATENTS, LatentPool, NpuPool
from sglang_npu.stream import NpuStream

MAX_GRAPHED_REQS = 256  # in a longer step the kernels outlast the host's launching of them


class NpuRuntime(TorchRuntime):
    """Decode steps are padded to buckets and replayed as graphs; prefills run in their own shapes, op by op.

    Where every op is watched (`ctx.watched`) there are no buckets and no graphs: a replay calls no op.
    """

    takes_exact_shapes = True
    collectives = "hccl"  # the backend of torch.distributed

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
        return NpuStream(self._driver)

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
        if spec.layout == LATENTS:
            return LatentPool(spec, num_pages, self.torch_device)
        self._refuse_layout(spec.layout, NpuPool.layout)
        return NpuPool(spec, num_pages, self.torch_device)

    def alloc_packed(self, num_bytes: int) -> torch.Tensor:
        return self._driver.pinned(num_bytes)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        timeout = timedelta(seconds=self.ctx.dist_timeout)
        if not dist.is_initialized():
            dist.init_process_group(
                self.collectives, store=store, rank=self.ctx.rank, world_size=self.ctx.world_size, timeout=timeout
            )
        return HcclCommunicator(dist.new_group(list(ranks), timeout=timeout), ranks, rank)


def batch_sizes(largest: int) -> list[int]:
    """Sizes that a decode step is padded to: 1, 2, 4, and then multiples of 8, an eighth too long at most where that is more."""
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size = size * 2 if size < 8 else size + max(8, 1 << (size.bit_length() - 3))
    return [*sizes, largest]
