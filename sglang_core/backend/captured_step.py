"""`CapturedSteps`: a step function whose bucketed batches are captured once each and replayed, with no launch of a kernel by the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.captured_driver import DeviceGraph
from sglang_core.backend.shared_memory import SharedMemory
from sglang_core.backend.tensor_tree import leaves, map_tensors

logger = logging.getLogger(__name__)

VARIANTS_PER_BUCKET = 8  # which optional inputs are there, and static parts of plans
Capture = Callable[[Callable[[], Any]], tuple[DeviceGraph, Any]]  # as `DeviceDriver.capture`


class CapturedSteps:
    """Called as the step is. A graph belongs to the shapes, dtypes and static values of its batch.

    The first batch of a kind runs as it is, which compiles what kernels compile late, and is then captured: at start-up, for the core sends a
    batch of every bucket through. Kinds beyond the limit run as they are, and the log says so once. One graph runs at a time, so that all
    read their inputs in the same memory.
    """

    def __init__(self, fn: Callable[..., Any], state: Any, capture: Capture, num_buckets: int) -> None:
        self._fn, self._state, self._capture = fn, state, capture
        self._limit = num_buckets * VARIANTS_PER_BUCKET
        self._inputs = SharedMemory()
        self._steps: dict[Hashable, CapturedStep] = {}

    def __call__(self, batch: Any) -> Any:
        kind = _kind(batch)
        with torch.inference_mode():
            if kind in self._steps:
                return self._steps[kind].replay(batch)
            if len(self._steps) == self._limit:
                logger.warning(
                    "a step runs without a graph: %d kinds of step have one, the most there may be", self._limit
                )
                self._limit = -1  # said once
            if len(self._steps) < self._limit:
                self._steps[kind] = CapturedStep(self._fn, self._state, batch, self._capture, self._inputs)
                return self._steps[kind].replay(batch)
            return self._fn(self._state, batch)


class CapturedStep:
    """The graph of one kind of batch, and the tensors that it reads in place of a batch's."""

    def __init__(self, fn: Callable[..., Any], state: Any, batch: Any, capture: Capture, inputs: SharedMemory) -> None:
        self._inputs = inputs.like(_tensors(batch))
        self._fill(batch)
        fn(state, self._own(batch))
        self._graph, self._outputs = capture(lambda: fn(state, self._own(batch)))

    def _own(self, batch: Any) -> Any:
        """The batch over this graph's tensors. A new one each time: a step may rebind its batch's fields."""
        own = iter(self._inputs)
        return map_tensors(batch, lambda _path, _x: next(own), "")

    def replay(self, batch: Any) -> Any:
        """New tensors: the graph's own are in memory that the next replay, of whichever graph, may overwrite."""
        self._fill(batch)
        self._graph.replay()
        return map_tensors(self._outputs, lambda _, x: x.clone(), "")

    def _fill(self, batch: Any) -> None:
        pairs = list(zip(self._inputs, _tensors(batch), strict=True))
        for own, given in pairs:
            if own.is_cpu:  # what kernels are told as host integers
                own.copy_(given)
        if on_device := [pair for pair in pairs if not pair[0].is_cpu]:
            torch._foreach_copy_([own for own, _ in on_device], [given for _, given in on_device])


def _kind(batch: Any) -> Hashable:
    return tuple(
        (path, (x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else x) for path, x in leaves(batch, "")
    )


def _tensors(batch: Any) -> list[Tensor]:
    return [x for _, x in leaves(batch, "") if isinstance(x, Tensor)]
