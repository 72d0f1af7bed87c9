"""What the runtime asks of a GPU, beside what it asks of any device. Tests put a fake in its place that refuses what a GPU would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sglang_core.api import DeviceDriver, TorchDriver, map_tensors

T = TypeVar("T")

LEAST_SWEPT = 64 << 20  # bytes: AMD's last cache is behind the L2, and no property tells its size
SWEEPS = 4  # times the cache: writing so much takes longer than the host does to launch what is timed behind it


class Driver(DeviceDriver, Protocol):
    """One GPU."""

    def seconds(self, fn: Callable[[], object], repeats: int) -> list[float]:
        """Of each of `repeats` runs of what `fn` launches on the current stream. Before each, memory larger than the L2 cache is written."""
        ...


class GpuDriver(TorchDriver):
    """`torch.cuda`, which speaks to NVIDIA's driver in one build of PyTorch and to AMD's in another."""

    def __init__(self, index: int) -> None:
        super().__init__(torch.device("cuda", index))
        # Ops sum in float32. By default cuBLAS may add up the parts of a long sum in bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    def capture(self, fn: Callable[[], T]) -> tuple[Any, T]:
        """Results do not own their memory. Kept, each graph's would be taken from what graphs share: the logits of every size of batch."""
        graph, result = super().capture(fn)
        return graph, map_tensors(result, lambda _, x: unowned(x), "")

    def seconds(self, fn: Callable[[], object], repeats: int) -> list[float]:
        cache = SWEEPS * int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        sweep = torch.empty(max(cache, LEAST_SWEPT), dtype=torch.int8, device=self.device)
        pairs = []
        for _ in range(repeats):
            sweep.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            pairs.append((begin, end))
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def unowned(x: Tensor) -> Tensor:
    """The same memory, which this tensor keeps from nobody. PyTorch's own graph trees make theirs by this call; there is no public one."""
    storage = torch._C._construct_storage_from_data_pointer(
        x.untyped_storage().data_ptr(), x.device, x.untyped_storage().nbytes()
    )
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())
