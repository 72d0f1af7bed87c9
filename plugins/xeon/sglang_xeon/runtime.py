"""`XeonRuntime`: one thread a physical core, tied to it, on one NUMA node."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_core.api import (
    Bucket,
    Communicator,
    HostStream,
    LocalCommunicator,
    Pool,
    PoolSpec,
    RuntimeContext,
    TorchRuntime,
)
from sglang_xeon.collectives import meet
from sglang_xeon.huge_pages import advise, empty
from sglang_xeon.step_graph import StepGraphs
from sglang_xeon.stream import KernelStream
from sglang_xeon.team import Team
from sglang_xeon.topology import compact, home_node, place, read_topology

logger = logging.getLogger(__name__)


class XeonRuntime(TorchRuntime):
    """The host CPU. Its stream's thread and the teams behind it are tied to cores; no other thread is.

    The thread that loads the model is left free within its NUMA node: it packs weights before the stream is busy.
    """

    def __init__(self, ctx: RuntimeContext) -> None:
        topology = read_topology()
        self.cpus = place(topology, rank=ctx.share, world_size=ctx.num_shares, num_threads=ctx.num_threads)
        self.num_threads = ctx.num_threads or len(self.cpus)
        super().__init__(ctx, "cpu")
        torch.set_num_threads(self.num_threads)
        self.team = Team(self.cpus, self.num_threads)
        self._stream: KernelStream | None = None
        if (node := home_node(topology, self.cpus)) is not None:
            os.sched_setaffinity(
                0, node
            )  # this thread and all that it starts: memory is on the node that first writes it
        logger.info("computing with %d threads on CPUs %s", self.num_threads, compact(self.cpus))

    def stream(self) -> HostStream:
        self._stream = KernelStream(self.team.start)
        return self._stream

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        """Replayed where shapes come again (`StepGraphs`): on one rank, as no tape knows of a meeting with others."""
        step = super().compile_step(fn, state, buckets)
        is_replayed = self.ctx.world_size == 1 and not self.ctx.watched
        if is_replayed:
            step = StepGraphs(step, self._wake)

        def followed(forward_batch: Any) -> Any:
            self.team.follow()
            if not is_replayed:
                self._wake()
            return step(forward_batch)

        return followed

    def _wake(self) -> None:
        if self._stream is not None:
            self._stream.wake()

    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        pool = super().alloc_pool(spec, num_pages)
        for leaf in pool.leaves:
            advise(leaf)
        return pool

    def alloc_packed(self, num_bytes: int) -> Tensor:
        return empty(num_bytes)

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        """Shared memory where all ranks are on this host, else gloo."""
        if len(ranks) == 1:
            return LocalCommunicator()
        return meet(ranks, rank, store, self.ctx.dist_timeout) or super().communicator(ranks, rank, store)
