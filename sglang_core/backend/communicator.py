"""`Communicator`: the collectives of one group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Their names from torch 2.13 on, and those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Communicator(Protocol):
    """Collectives over one group. Tensors live on the group's device; ranks are group ranks.

    Every rank calls the same ones in the same order, with shapes and dtypes that agree; empty tensors take part. Results are bit
    for bit the same on all ranks: where two ranks differ in a sum's last bit, one day they sample two tokens. Strides are taken
    as they are, or refused in an error that says "contiguous". Where a rank dies the others get an error within
    `RuntimeContext.dist_timeout`. Two communicators of the same ranks do not disturb each other.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may work in place, the result is what counts."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate every rank's x along dim, in rank order."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Sum over ranks, then this rank's slice along dim, which divides by `size`; may use x as scratch."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """x: [size, ...] -> [size, ...]: row j goes to rank j, row i comes from rank i."""

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """src's x; may work in place, the result is what counts."""

    def send(self, x: Tensor, dst: int) -> None: ...

    def recv(self, x: Tensor, src: int) -> Tensor:
        """Fills x with what src sends, and returns it."""

    def barrier(self) -> None: ...


class LocalCommunicator:
    """One rank: every collective is the identity."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x

    def send(self, x: Tensor, dst: int) -> None:
        raise ValueError(f"send to rank {dst}: this group has one rank")

    def recv(self, x: Tensor, src: int) -> Tensor:
        raise ValueError(f"recv from rank {src}: this group has one rank")

    def barrier(self) -> None:
        return


class TorchCommunicator:
    """torch.distributed on any of its backends (gloo on a host)."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        self.group, self.ranks = group, tuple(ranks)
        self.rank, self.size = self.ranks.index(rank), len(ranks)

    # gloo takes strides for dense ones, and is then wrong without a word.

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.all_reduce(x).chunk(self.size, dim=dim)[self.rank].contiguous()

    def all_to_all(self, x: Tensor) -> Tensor:
        gathered = self.all_gather(x[None], dim=0)  # gloo has no all_to_all for every dtype
        return gathered[:, self.rank].contiguous()

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        x = x.contiguous()
        dist.broadcast(x, src=self.ranks[src], group=self.group)
        return x

    def send(self, x: Tensor, dst: int) -> None:
        dist.send(x.contiguous(), dst=self.ranks[dst], group=self.group)

    def recv(self, x: Tensor, src: int) -> Tensor:
        dense = x.contiguous()
        dist.recv(dense, src=self.ranks[src], group=self.group)
        return x if dense is x else x.copy_(dense)

    def barrier(self) -> None:
        dist.barrier(group=self.group)


class FlatCommunicator(TorchCommunicator):
    """One buffer where gloo needs a list of them, as libraries of devices take it. Sums are the same on every rank: each part is added up by one and passed on."""

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
