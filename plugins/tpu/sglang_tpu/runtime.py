"""`TpuRuntime`: one device of JAX, or a mesh of several. Core's tensors are on the host; steps, weights and pools are on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import torch
from jax.sharding import Mesh

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
from sglang_tpu.environment import stay_on_device, zeros
from sglang_tpu.join import join_models
from sglang_tpu.mesh import AXIS, MeshCommunicator, zeros_over
from sglang_tpu.pools import POOLS, TpuStatePool, pool_of
from sglang_tpu.step import JittedStep, WatchedStep

M = TypeVar("M")


class TpuRuntime(TorchRuntime):
    """Steps are padded to buckets, traced once each and compiled at start."""

    def __init__(self, ctx: RuntimeContext, devices: Sequence[jax.Device]) -> None:
        """Raises DeviceError where every op of a step over several is to be looked at."""
        super().__init__(ctx, "cpu")
        if len(devices) > 1 and ctx.watched:
            raise DeviceError(
                f"--verify-kernels and profile look at each op as it runs, and a step over {len(devices)} ranks is one program; leave out"
                " --tp-size, or these"
            )
        self._devices = tuple(devices)
        self._mesh = Mesh(np.array(devices), (AXIS,)) if len(devices) > 1 else None
        self._steps: list[JittedStep] = []

    def memory(self) -> MemoryInfo:
        """Of the device that has least free; on the host, each one's share of it."""
        stats = [device.memory_stats() for device in self._devices]
        if not all(stats):
            host = super().memory()
            return MemoryInfo(total=host.total // len(stats), free=host.free // len(stats))
        fullest = min(stats, key=lambda one: one["bytes_limit"] - one["bytes_in_use"])
        total = fullest["bytes_limit"]
        return MemoryInfo(total=total, free=total - fullest["bytes_in_use"])

    def synchronize(self) -> None:
        """What was dispatched before has ended once this has: a device runs its programs in order."""
        jax.block_until_ready([jax.device_put(0, device) + 0 for device in self._devices])

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
        step = JittedStep(fn, state, len(buckets), strict=self.ctx.strict_compile, mesh=self._mesh)
        self._steps.append(step)
        return step

    def num_compiles(self) -> int:
        return sum(step.num_programs for step in self._steps)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        if len(ranks) != len(self._devices):
            raise DeviceError(
                f"{len(ranks)} ranks over {len(self._devices)} devices: one process has a device for each"
            )
        return MeshCommunicator(rank, len(ranks))

    def join_ranks(self, models: Iterator[M]) -> M:
        return super().join_ranks(models) if self._mesh is None else join_models(models, self._mesh)

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        if spec.layout not in POOLS:
            self._refuse_layout(spec.layout, Pool.layout)
        return pool_of(spec, num_pages, self._zeros)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, StatePool.layout)
        return TpuStatePool(spec, num_slots, self._zeros)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Any:
        return zeros(shape, dtype) if self._mesh is None else zeros_over(self._mesh, shape, dtype)


def powers_of_two(first: int, limit: int) -> list[int]:
    """first, 2 first, ... below limit, and limit itself."""
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= 2
    return [*sizes, limit]
