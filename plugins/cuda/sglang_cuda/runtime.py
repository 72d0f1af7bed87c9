"""`CudaRuntime`: what GPUs of NVIDIA have beside those of AMD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_triton.gpu.runtime import GpuRuntime

from sglang_core.api import Communicator, FlatCommunicator
from sglang_cuda.all_reduce import meet


class CudaRuntime(GpuRuntime):
    """Short sums go through memory that the ranks map of each other, where they can."""

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        found = super().communicator(ranks, rank, store)
        return meet(found, store, self.ctx.dist_timeout) if isinstance(found, FlatCommunicator) else found
