"""`XeonRuntime`: one thread a physical core, tied to it, on one NUMA node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang_core.api import Communicator, HostStream, LocalCommunicator, RuntimeContext, TorchRuntime
from sglang_xeon.collectives import meet
from sglang_xeon.library import ops
from sglang_xeon.topology import compact, place, read_topology

logger = logging.getLogger(__name__)


class XeonRuntime(TorchRuntime):
    """The host CPU. Its stream's thread and torch's pool behind it are tied to cores; no other thread is.

    The thread that loads the model is left free: it packs weights on a pool of its own, before the stream is busy.
    """

    def __init__(self, ctx: RuntimeContext) -> None:
        topology = read_topology()
        self.cpus = place(topology, rank=ctx.rank, world_size=ctx.world_size, num_threads=ctx.num_threads)
        self.num_threads = ctx.num_threads or len(self.cpus)
        super().__init__(ctx, "cpu")
        torch.set_num_threads(self.num_threads)
        logger.info("computing with %d threads on CPUs %s", self.num_threads, compact(self.cpus))

    def stream(self) -> HostStream:
        return HostStream(self._start_thread(self.num_threads, self.cpus))

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        """Shared memory where all ranks are on this host, else gloo."""
        if len(ranks) == 1:
            return LocalCommunicator()
        return meet(ranks, rank, store, self.ctx.dist_timeout) or super().communicator(ranks, rank, store)

    @staticmethod
    def _start_thread(num_threads: int, cpus: list[int]) -> Callable[[], None]:
        def start() -> None:
            torch.set_num_threads(num_threads)  # counted per calling thread
            if len(cpus) == num_threads and ops.pin_threads(cpus) != num_threads:
                logger.warning("cannot tie %d threads to CPUs %s; they float", num_threads, compact(cpus))

        return start
