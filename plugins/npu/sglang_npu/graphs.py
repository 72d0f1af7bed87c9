"""`GraphedStep`: a step function whose bucketed batches are captured once each and replayed, with no launch of a kernel by the host.

Attention is told the lengths of its reqs as host integers, and a graph keeps what it was captured with. So kernels read them from a host
tensor of the batch through `host_lengths`, which notes in a capture which tensor each call reads; before a replay the graph is told the tensors' new values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sglang_core.api import leaves, map_tensors
from sglang_npu.driver import Driver, Graph

log = logging.getLogger(__name__)

VARIANTS_PER_BUCKET = 8  # which optional inputs are there, and static parts of plans
Note = tuple[str, Tensor]  # an op's argument, and the host tensor that it is read from
_notes: ContextVar[list[Note] | None] = ContextVar("_notes", default=None)


def host_lengths(argument: str, lengths: Tensor) -> list[int]:
    """What a call passes as `argument`: the numbers of an integer tensor on the host. One argument a call."""
    notes = _notes.get()
    if notes is not None:
        notes.append((argument, lengths))
    numbers: list[int] = lengths.tolist()
    return numbers


@contextmanager
def noted() -> Iterator[list[Note]]:
    """Which tensors `host_lengths` reads in this thread meanwhile."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


class GraphedStep:
    """Called as the step is. A graph belongs to the shapes, dtypes and static values of its batch.

    The first batch of a kind runs as it is, and is then captured: at start-up, for the core sends a batch of every bucket through. Kinds
    beyond the limit run as they are, and the log says so once.
    """

    def __init__(self, fn: Callable[..., Any], state: Any, driver: Driver, num_buckets: int) -> None:
        self._fn, self._state, self._driver = fn, state, driver
        self._limit = num_buckets * VARIANTS_PER_BUCKET
        self._graphs: dict[Hashable, CapturedStep] = {}

    def __call__(self, batch: Any) -> Any:
        kind = _kind(batch)
        with torch.inference_mode():
            if kind in self._graphs:
                return self._graphs[kind].replay(batch)
            if len(self._graphs) == self._limit:
                log.warning(
                    "a step runs without a graph: %d kinds of step have one, the most there may be", self._limit
                )
                self._limit = -1  # said once
            if len(self._graphs) < self._limit:
                self._graphs[kind] = CapturedStep(self._fn, self._state, batch, self._driver)
                return self._graphs[kind].replay(batch)
            return self._fn(self._state, batch)


class CapturedStep:
    """The graph of one kind of batch, and the tensors that it reads in place of a batch's."""

    def __init__(self, fn: Callable[..., Any], state: Any, batch: Any, driver: Driver) -> None:
        self._inputs = [x.clone() for x in _tensors(batch)]
        fn(state, self._own(batch))
        self._graph: Graph
        with noted() as self._notes:
            self._graph, self._outputs = driver.capture(lambda: fn(state, self._own(batch)))

    def _own(self, batch: Any) -> Any:
        """The batch over this graph's tensors. A new one each time: a step may rebind its batch's fields."""
        own = iter(self._inputs)
        return map_tensors(batch, lambda _path, _x: next(own), "")

    def replay(self, batch: Any) -> Any:
        """New tensors: the graph's own are in memory that the next replay, of whichever graph, may overwrite."""
        for own, given in zip(self._inputs, _tensors(batch), strict=True):
            own.copy_(given)
        if self._notes:
            self._graph.update([{argument: lengths.tolist()} for argument, lengths in self._notes])
        self._graph.replay()
        return map_tensors(self._outputs, lambda _, x: x.clone(), "")


def _kind(batch: Any) -> Hashable:
    return tuple(
        (path, (x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else x) for path, x in leaves(batch, "")
    )


def _tensors(batch: Any) -> list[Tensor]:
    return [x for _, x in leaves(batch, "") if isinstance(x, Tensor)]
