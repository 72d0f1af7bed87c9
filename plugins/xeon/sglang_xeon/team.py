"""The compute threads behind a stream: tied to their CPUs, and tied anew when the process may use other ones."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

import torch

from sglang_xeon.library import ops
from sglang_xeon.topology import compact

logger = logging.getLogger(__name__)
LOOK_EVERY = 1.0  # seconds between two looks at the affinity mask; a look takes a microsecond


class Team:
    """`num_threads` threads on `cpus`, torch's and our kernels' alike. Every method is called on the stream's thread.

    The mask that counts is the process's main thread's, as `taskset` and a shrinking cpuset change it: the compute threads' own masks
    are set here. Results do not depend on the number of threads, so it may change between two steps.
    """

    def __init__(self, cpus: Sequence[int], num_threads: int, allowed: Callable[[], set[int]] | None = None) -> None:
        self.cpus, self.num_threads = list(cpus), num_threads
        self._allowed = allowed or (lambda: os.sched_getaffinity(os.getpid()))
        self._seen = self._allowed()
        self._next_look = 0.0

    def start(self) -> None:
        self._use(self.cpus)

    def follow(self) -> None:
        """Give up CPUs that were taken away since the last look, and take back those that came back."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        allowed = self._allowed()
        if allowed == self._seen:
            return
        self._seen = allowed
        left = [cpu for cpu in self.cpus if cpu in allowed] or sorted(allowed)[: len(self.cpus)]
        logger.warning("this process may now use CPUs %s: computing on %s", compact(allowed), compact(left))
        self._use(left)

    def _use(self, cpus: Sequence[int]) -> None:
        """A thread a CPU where there are as many as wanted, or fewer; more threads than CPUs float."""
        num_threads = self.num_threads if len(cpus) == len(self.cpus) else min(self.num_threads, len(cpus))
        torch.set_num_threads(num_threads)  # counted per calling thread
        if len(cpus) == num_threads and ops.pin_threads(list(cpus)) != num_threads:
            logger.warning("cannot tie %d threads to CPUs %s; they float", num_threads, compact(cpus))
