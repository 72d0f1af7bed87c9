"""`TpuRuntime`: one device of JAX. Core's tensors are on the host; steps, weights and pools are on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sglang_core.api import (
    Bucket,
    Communicator,
    DeviceError,
    HostStream,
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
from sglang_tpu.environment import stay_on_device
from sglang_tpu.pools import LanePool, TpuStatePool, pool_of
from sglang_tpu.step import JittedStep, WatchedStep


class TpuRuntime(TorchRuntime):
    """Steps are padded to buckets, traced once each and compiled at start."""

    def __init__(self, ctx: RuntimeContext, device: jax.Device) -> None:
        super().__init__(ctx, "cpu")
        self._device = device
        self._steps: list[JittedStep] = []

    def memory(self) -> MemoryInfo:
        stats = self._device.memory_stats()
        if not stats:
            return super().memory()
        total = stats["bytes_limit"]
        return MemoryInfo(total=total, free=total - stats["bytes_in_use"])

    def synchronize(self) -> None:
        """What was dispatched before has ended once this has: a device runs its programs in order."""
        jax.block_until_ready(jax.device_put(0, self._device) + 0)

    def stream(self) -> Stream:
        return HostStream(stay_on_device)

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        """Decode by reqs and prefill by tokens, each a power of two."""
        decode = [
            Bucket(num_tokens=r, num_reqs=r, max_extend=1, num_pages=max_num_pages)
            for r in powers_of_two(1, max_num_reqs)
        ]
        prefill = [
            Bucket(num_tokens=t, num_reqs=max_num_reqs, max_extend=t, num_pages=max_num_pages)
            for t in powers_of_two(16, max_num_tokens)
        ]
        return decode + prefill

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        if self.ctx.watched:
            return WatchedStep(fn, state)
        step = JittedStep(fn, state, len(buckets), strict=self.ctx.strict_compile)
        self._steps.append(step)
        return step

    def num_compiles(self) -> int:
        return sum(step.num_programs for step in self._steps)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) > 1:
            raise DeviceError(
                f"{len(ranks)} ranks: the backend 'tpu' has no mesh yet, and runs one; leave out --tp-size"
            )
        return LocalCommunicator()

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        if spec.layout != LanePool.layout:
            self._refuse_layout(spec.layout, Pool.layout)
        return pool_of(spec, num_pages)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, StatePool.layout)
        return TpuStatePool(spec, num_slots)


def powers_of_two(first: int, limit: int) -> list[int]:
    """first, 2 first, ... below limit, and limit itself."""
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= 2
    return [*sizes, limit]
