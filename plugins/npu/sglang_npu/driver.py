"""What the runtime asks of an NPU, beside what it asks of any device. An emulation puts the host in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from sglang_core.api import DeviceDriver, DeviceGraph, TorchDriver

T = TypeVar("T")
Lengths = Mapping[str, list[int]]  # of one call of an op, by the names of its arguments


class Graph(DeviceGraph, Protocol):
    """Captured work of a stream."""

    def update(self, lengths: Sequence[Lengths]) -> None:
        """Other host integers for the captured calls of ops that take some, in the order in which they were captured."""


class Driver(DeviceDriver, Protocol):
    """One NPU."""

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]: ...


class NpuDriver(TorchDriver):
    """`torch.npu`, which torch_npu brings."""

    def __init__(self, index: int) -> None:
        import torch_npu  # noqa: F401  it registers the device

        super().__init__(torch.device("npu", index))
        self.module.set_compile_mode(jit_compile=False)  # ops from the binary package: none is compiled for a new shape
        self.module.config.allow_internal_format = True  # weights may be FRACTAL_NZ

    def new_graph(self) -> Any:
        return self.module.NPUGraph()

    def graph_options(self) -> dict[str, Any]:
        return {"auto_dispatch_capture": True}  # calls with host integers can be updated

    def capture(self, fn: Callable[[], T]) -> tuple[Graph, T]:
        graph, result = super().capture(fn)
        return NpuGraph(graph), result


class NpuGraph:
    """A `torch.npu.NPUGraph`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def update(self, lengths: Sequence[Lengths]) -> None:
        self._graph.update(cpu_update_input=[dict(each) for each in lengths])

    def replay(self) -> None:
        self._graph.replay()
