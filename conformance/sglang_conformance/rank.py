"""What one rank of a group is: a communicator, numbers of its own, streams. Real ones are processes; the reference's are threads.

A *program* is a function of a `Rank`, the same on all of them. It runs on the device's communicator in processes of their own
(`rank_host`), and on `ReferenceCommunicator`, whose collectives are a line each, for what must come out.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.communicator import Communicator
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext, Stream
from sglang_core.backend.torch_runtime import TorchRuntime

DIED = 17  # exit status of a rank that a program ends
Program = Callable[..., Mapping[str, Tensor]]


@dataclass(kw_only=True)
class Rank:
    """`another` makes one more communicator of the same ranks; every rank calls it as often."""

    comm: Communicator
    dtype: torch.dtype
    seed: int
    timeout: float  # seconds that a collective may take before it raises
    runtime: DeviceRuntime
    place: Callable[[Tensor], Tensor]
    another: Callable[[], Communicator]
    die: Callable[[], None] = lambda: os._exit(DIED)
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed * 1009 + self.comm.rank)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def numbers(self, *shape: int) -> Tensor:
        """This rank's own: normal ones, or integers of either sign where the dtype is one."""
        if not self.dtype.is_floating_point:
            return self.place(torch.randint(-1000, 1000, shape, generator=self._generator).to(self.dtype))
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return self.place(x.to(self.dtype))

    def stream(self) -> Stream:
        return self.runtime.stream()


class _Died(BaseException):
    """Ends a thread that stands for a rank, as exit ends a process."""


class World:
    """What the threads of a reference group share: for each of its communicators, a place where all meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []

    def exchange(self, number: int) -> Exchange:
        with self._lock:
            while len(self._exchanges) <= number:
                self._exchanges.append(Exchange(self.size))
            return self._exchanges[number]

    def abort(self) -> None:
        """A rank has died: whoever waits for it gets an error."""
        for exchange in self._exchanges:
            exchange.abort()


class Exchange:
    """Every rank puts a tensor in and sees all of them."""

    def __init__(self, size: int) -> None:
        self.pipes: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self._size, self._changed, self._dead = size, threading.Condition(), False
        self._met = [0] * size  # how often each rank was here
        self._rounds: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        """In rank order. Raises ConnectionError where one of them will never come."""
        with self._changed:
            shown = self._rounds[self._met[rank]]
            self._met[rank] += 1
            shown[rank] = x
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(shown) == self._size or self._dead)
            if len(shown) < self._size:
                raise ConnectionError("a rank has died")
            return [shown[r] for r in range(self._size)]

    def abort(self) -> None:
        with self._changed:
            self._dead = True
            self._changed.notify_all()


class ReferenceCommunicator:
    """The definition of every collective: sums go in rank order, and are rounded after each, as those of a ring are."""

    def __init__(self, exchange: Exchange, rank: int, size: int) -> None:
        self._exchange, self.rank, self.size = exchange, rank, size

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._all(x)
        for other in others:
            first = first + other
        return first

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._all(x), dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.all_reduce(x).chunk(self.size, dim=dim)[self.rank].contiguous()

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.stack([y[self.rank] for y in self._all(x)])

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return self._all(x)[src].clone()

    def send(self, x: Tensor, dst: int) -> None:
        self._exchange.pipes[self.rank, dst].put(x.clone())

    def recv(self, x: Tensor, src: int) -> Tensor:
        return x.copy_(self._exchange.pipes[src, self.rank].get(timeout=60))

    def barrier(self) -> None:
        self._all(torch.empty(0))

    def _all(self, x: Tensor) -> list[Tensor]:
        return self._exchange.all(self.rank, x.clone())


def run_reference(
    program: Program,
    args: Mapping[str, Any],
    *,
    size: int,
    dtype: torch.dtype,
    seed: int,
    oracle: bool,
    seen: Callable[[int, Tensor], None] = lambda rank, x: None,
) -> dict[int, Mapping[str, Tensor]]:
    """What each rank's program returns, by rank; a rank that dies returns nothing. In float64 for the oracle.

    `seen` is called with a rank and a copy of each tensor that the rank is given, in order.
    """
    world = World(size)
    runtime = TorchRuntime(RuntimeContext(devices=()))

    def die() -> None:
        world.abort()
        raise _Died

    def one(rank: int) -> Mapping[str, Tensor] | None:
        made = 0

        def place(x: Tensor) -> Tensor:
            seen(rank, x.clone())  # a program may write to its own
            return x.double() if oracle and x.is_floating_point() else x

        def another() -> Communicator:
            nonlocal made
            made += 1
            return ReferenceCommunicator(world.exchange(made - 1), rank, size)

        me = Rank(
            comm=another(),
            dtype=dtype,
            seed=seed,
            timeout=60.0,
            runtime=runtime,
            place=place,
            another=another,
            die=die,
        )
        try:
            return program(me, **args)
        except _Died:
            return None
        except BaseException:
            world.abort()  # the others would wait for ever
            raise

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(one, range(size)))
    return {rank: outputs for rank, outputs in enumerate(found) if outputs is not None}


def same_everywhere(outputs: Mapping[int, Mapping[str, Tensor]], names: Sequence[str]) -> None:
    """Every rank has the same bits: ranks that differ in the last one sample different tokens one day."""
    first, *others = sorted(outputs)
    for rank in others:
        for name in names:
            assert torch.equal(outputs[first][name], outputs[rank][name]), (
                f"{name} of rank {rank} is not bit for bit that of rank {first}"
            )
