"""`HostDriver`: an NPU that is the host. Work runs when it is launched; graphs record ops with their tensors, and run them again on those.

What a captured graph would get wrong shows: host integers of a call stay what they were, unless the graph is told others; what Python does
between ops is not done again; and what another graph left in the memory that they share is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import psutil
import torch
from sglang_npu.driver import Lengths
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
HOST_READS = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
UPDATED = "npu.npu_fused_infer_attention_score_v2"  # of the ops with host integers, the one that is used; torch_npu lists which can be updated


class CaptureError(RuntimeError):
    """What a capture on an NPU would refuse, or get wrong."""


class Event:
    def synchronize(self) -> None:
        return

    def query(self) -> bool:
        return True


class HostDriver:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def bind(self) -> None:
        return

    def memory(self) -> tuple[int, int]:
        host = psutil.virtual_memory()
        return host.available, host.total

    def num_allocations(self) -> int:
        """Those of captures: a replay makes none."""
        return len(self.graphs)

    def synchronize(self) -> None:
        return

    def new_stream(self) -> object:
        return object()

    def current_stream(self) -> object:
        return self

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        with nullcontext(stream):
            yield

    def record(self, stream: object) -> Event:
        return Event()

    def wait(self, stream: object, event: object) -> None:
        return

    def capture(self, fn: Callable[[], T]) -> tuple[RecordedGraph, T]:
        with _Recorder() as recorder:
            result = fn()
        graph = RecordedGraph(self, recorder)
        self.graphs.append(graph)
        return graph, result

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


class RecordedGraph:
    """Ops and their tensors."""

    def __init__(self, driver: HostDriver, recorder: _Recorder) -> None:
        self._driver, self._ops = driver, recorder.ops
        self.made = [t for *_, results in self._ops for t in results if isinstance(t, Tensor) and not recorder.knew(t)]

    def update(self, lengths: Sequence[Lengths]) -> None:
        """As `torch.npu.NPUGraph.update`: an entry for each call that can be updated, or one for all of them."""
        calls = [kwargs for func, _, kwargs, _ in self._ops if str(func.overloadpacket) == UPDATED]
        if len(lengths) == 1:
            lengths = list(lengths) * len(calls)
        if len(lengths) != len(calls):
            raise CaptureError(f"{len(calls)} captured calls can be updated, and {len(lengths)} were given")
        for kwargs, new in zip(calls, lengths, strict=True):
            kwargs.update({name: value for name, value in new.items() if name in kwargs})

    def replay(self) -> None:
        for other in self._driver.graphs:
            if other is not self:
                for t in other.made:
                    t.fill_(torch.nan if t.is_floating_point() else 1)
        for func, args, kwargs, results in self._ops:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Every op but views: what they look at stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []
        self._given: list[Tensor] = []
        self._places: set[int] = set()
        self._made: set[int] = set()

    def knew(self, t: Tensor) -> bool:
        """Whether it lies in memory from before the capture."""
        return _place(t) in self._places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._refuse_host_reads(func, args, inputs)
        for t in inputs:
            if _place(t) not in self._made:
                self._places.add(_place(t))
                self._given.append(t)  # alive, so that no new tensor takes its place
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        looked_at = {_place(t) for t in inputs}
        is_view = any(isinstance(t, Tensor) and _place(t) in looked_at for t in results)
        if func._schema.is_mutable or not is_view:
            self.ops.append((func, args, kwargs, results))
            self._made |= {_place(t) for t in results if isinstance(t, Tensor)} - self._places
        return out

    def _refuse_host_reads(self, func: Any, args: Any, inputs: list[Tensor]) -> None:
        by_mask = func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1])
        if by_mask or str(func.overloadpacket) in HOST_READS:
            raise CaptureError(f"{func} reads a value on the host while a stream is captured")


def _place(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
