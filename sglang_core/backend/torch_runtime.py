"""`TorchRuntime`: a `DeviceRuntime` for any device that PyTorch can address, eagerly. A plugin overrides what it does better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sglang_core.backend.communicator import Communicator, LocalCommunicator, TorchCommunicator
from sglang_core.backend.interface import Bucket, DeviceRuntime, MemoryInfo, RuntimeContext, Stream
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.errors import KernelSelectionError


class HostStream:
    """A single thread that runs what is submitted in order: how a host CPU is an asynchronous device."""

    def __init__(self, initializer: Callable[[], None] | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="device", initializer=initializer)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._pool.submit(fn, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class TorchRuntime(DeviceRuntime):
    """Eager PyTorch on `device`: exact shapes, no buckets, host memory figures, gloo collectives."""

    def __init__(self, ctx: RuntimeContext, device: torch.device | str = "cpu") -> None:
        self.infos, self.torch_device, self.ctx = ctx.devices, torch.device(device), ctx
        if ctx.num_threads is not None:
            torch.set_num_threads(ctx.num_threads)

    def memory(self) -> MemoryInfo:
        """What this process may use of the host: what is available and what it holds already, within its cgroup's limit.

        Not all the host's memory: a host is shared, and a share of what others hold is no headroom of ours. Ranks that share it have equal parts.
        """
        available, own = psutil.virtual_memory().available, psutil.Process().memory_info().rss
        if limit := _cgroup_bytes("memory.max"):
            available = min(available, max(0, limit - _cgroup_bytes("memory.current")))
        free = available // self.ctx.num_shares
        return MemoryInfo(total=free + own, free=free)

    def synchronize(self) -> None:
        return

    def stream(self) -> Stream:
        threads = torch.get_num_threads()  # intra-op threads are set per calling thread
        return HostStream(lambda: torch.set_num_threads(threads))

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        return ()

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        def step(forward_batch: Any) -> Any:
            with torch.inference_mode():
                return fn(state, forward_batch)

        return step

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        self._refuse_layout(spec.layout, Pool.layout)
        return Pool(spec, num_pages, self.torch_device)

    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        self._refuse_layout(spec.layout, StatePool.layout)
        return StatePool(spec, num_slots, self.torch_device)

    def alloc_packed(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def _refuse_layout(self, wanted: str, ours: str) -> None:
        if wanted != ours:
            owner = self.infos[0].backend
            raise KernelSelectionError(
                f"pool layout {wanted!r}: the runtime of {owner!r} makes {ours!r} only; its alloc_pool must make"
                " every layout that its kernels list in kv_layouts"
            )

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                store=store,
                rank=self.ctx.rank,
                world_size=self.ctx.world_size,
                timeout=timedelta(seconds=self.ctx.dist_timeout),
            )
        return TorchCommunicator(
            dist.new_group(list(ranks), timeout=timedelta(seconds=self.ctx.dist_timeout)), ranks, rank
        )

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _cgroup_bytes(name: str) -> int:
    """A figure of this process's cgroup (v2) in bytes, 0 where there is none or no limit."""
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else 0
