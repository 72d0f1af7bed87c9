"""Backends whose communicators have one mistake each. Ranks make them by name in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.claims import Claims
from sglang_core.backend.communicator import Communicator, TorchCommunicator
from sglang_core.backend.interface import DeviceInfo, DeviceRuntime, KernelContext, RuntimeContext
from sglang_core.backend.torch_backend import TorchBackend
from sglang_core.backend.torch_runtime import TorchRuntime

LANES = 8


class HonestBackend(TorchBackend):
    name = "ranks"
    communicator: type[TorchCommunicator] = TorchCommunicator

    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend=self.name, path=self.name, name="a host with collectives")]

    def claims(self, ctx: KernelContext) -> Claims:
        return Claims(profiles=("base", "comm"))

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return _Runtime(ctx, self.communicator)


class _Runtime(TorchRuntime):
    def __init__(self, ctx: RuntimeContext, kind: type[TorchCommunicator]) -> None:
        super().__init__(ctx, "cpu")
        self._kind = kind

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        made = super().communicator(ranks, rank, store)
        assert isinstance(made, TorchCommunicator)
        return self._kind(made.group, ranks, rank)


class _SkipsTheTail(TorchCommunicator):
    """Whole vectors only."""

    def all_reduce(self, x: Tensor) -> Tensor:
        whole = x.numel() // LANES * LANES
        mine = x.contiguous().flatten()[whole:].clone()
        total = super().all_reduce(x).flatten()
        return torch.cat([total[:whole], mine]).view(x.shape)


class _GathersFromItself(TorchCommunicator):
    """This rank's part comes first, as in a ring that nobody turned back."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        parts = super().all_gather(x, dim=dim).chunk(self.size, dim=dim)
        return torch.cat([*parts[self.rank :], *parts[: self.rank]], dim=dim)


class _GathersRows(TorchCommunicator):
    """Along the first dim, whichever was asked for."""

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= self.size
        return super().all_gather(x, dim=0).reshape(shape)


class _DiffersInTheLastBit(TorchCommunicator):
    """Each rank adds its own part last."""

    def all_reduce(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return super().all_reduce(x)
        parts = list(super().all_gather(x[None], dim=0))
        parts.append(parts.pop(self.rank))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class _SumsInBFloat16(TorchCommunicator):
    """To halve what goes over the wire."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x.bfloat16()).to(x.dtype) if x.is_floating_point() else super().all_reduce(x)


class _AveragesWhatItSums(TorchCommunicator):
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return (
            super().reduce_scatter(x, dim=dim) / self.size if x.is_floating_point() else super().reduce_scatter(x, dim)
        )


class _ScattersRows(TorchCommunicator):
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = super().reduce_scatter(x, dim=dim)
        flat = self.all_reduce(x.clone()).flatten() / self.size
        return flat.chunk(self.size)[self.rank].view(part.shape)


class _SendsBackwards(TorchCommunicator):
    """Row j comes from where row j should go."""

    def all_to_all(self, x: Tensor) -> Tensor:
        return super().all_to_all(x.flip(0).contiguous())


class _BroadcastsFromTheFirst(TorchCommunicator):
    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return super().broadcast(x, src=0)


class _TakesStridesForDense(TorchCommunicator):
    def all_reduce(self, x: Tensor) -> Tensor:
        dense = x.as_strided(x.shape, torch.empty(x.shape).stride())
        return x.copy_(super().all_reduce(dense.clone()))


class _WaitsForTheDead(TorchCommunicator):
    """Whatever goes wrong, it tries again."""

    def all_reduce(self, x: Tensor) -> Tensor:
        while True:
            try:
                return super().all_reduce(x)
            except RuntimeError:
                time.sleep(0.05)


class _IgnoresTheDead(TorchCommunicator):
    """What did not come counts as nothing."""

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            return super().all_reduce(x)
        except RuntimeError:
            return x


class _LeavesAHelperBehind(TorchCommunicator):
    """It starts a process and does not end it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)


class _SharesOneBuffer(TorchCommunicator):
    """All communicators of a process sum in the same memory."""

    buffer = torch.zeros(1 << 16)

    def all_reduce(self, x: Tensor) -> Tensor:
        mine = self.buffer[: x.numel()].copy_(x.flatten())
        time.sleep(0.002)
        super().all_reduce(mine)
        time.sleep(0.002)
        return mine.to(x.dtype).view(x.shape).clone()


def _backend(kind: type[TorchCommunicator]) -> type[HonestBackend]:
    """Under a name in this module, by which ranks find it."""
    name = kind.__name__.lstrip("_") + "Backend"
    made = type(name, (HonestBackend,), {"communicator": kind, "__module__": __name__, "__qualname__": name})
    globals()[name] = made
    return made


MUTANTS = {
    kind.__name__.lstrip("_"): (_backend(kind), texts)
    for kind, texts in (
        (_SkipsTheTail, "comm.all_reduce[odd"),
        (_GathersFromItself, "comm.all_gather[odd"),
        (_GathersRows, "comm.all_gather[odd"),
        (_DiffersInTheLastBit, "comm.all_reduce[odd sizes, 3"),
        (_SumsInBFloat16, "comm.all_reduce[odd"),
        (_AveragesWhatItSums, "comm.reduce_scatter[odd"),
        (_ScattersRows, "comm.reduce_scatter[by columns"),
        (_SendsBackwards, "comm.all_to_all[odd"),
        (_BroadcastsFromTheFirst, "comm.broadcast[odd"),
        (_TakesStridesForDense, "comm.all_reduce[strides"),
        (_WaitsForTheDead, "comm.failure[a rank dies, 2"),
        (_IgnoresTheDead, "comm.failure[a rank dies, 2"),
        (_LeavesAHelperBehind, "comm.p2p[odd sizes, 2"),
        (_SharesOneBuffer, "comm.order[of two streams, 2"),
    )
}
