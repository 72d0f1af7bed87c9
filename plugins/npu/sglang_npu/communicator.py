"""Collectives between NPUs, by HCCL."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sglang_core.api import TorchCommunicator

# Their names from torch 2.13 on, and those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class HcclCommunicator(TorchCommunicator):
    """One buffer where gloo needs a list of them."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        gathered = x.new_empty(self.size * x.numel())
        _all_gather(gathered, x.contiguous().view(-1), group=self.group)
        dim %= x.dim()
        return gathered.view(self.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        parts = torch.stack(x.chunk(self.size, dim=dim))
        mine = torch.empty_like(parts[0])
        _reduce_scatter(mine.view(-1), parts.view(-1), group=self.group)
        return mine

    def all_to_all(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=self.group)
        return received
