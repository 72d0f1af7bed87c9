"""Graphs that are told each batch's lengths.

Attention is told the lengths of its reqs as host integers, and a graph keeps what it was captured with. So kernels read them from a host
tensor of the batch through `host_lengths`, which notes in a capture which tensor each call reads; before a replay the graph is told the tensors' new values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor

from sglang_npu.driver import Driver, Graph

T = TypeVar("T")
Note = tuple[str, Tensor]  # an op's argument, and the host tensor that it is read from
_notes: ContextVar[list[Note] | None] = ContextVar("_notes", default=None)


def host_lengths(argument: str, lengths: Tensor) -> list[int]:
    """What a call passes as `argument`: the numbers of an integer tensor on the host. One argument a call."""
    notes = _notes.get()
    if notes is not None:
        notes.append((argument, lengths))
    numbers: list[int] = lengths.tolist()
    return numbers


def refuse_capture(what: str) -> None:
    """Raises RuntimeError while a step is captured."""
    if _notes.get() is not None:
        raise RuntimeError(f"{what}, and a graph would keep those of its capture; run the step as it is")


@contextmanager
def noted() -> Iterator[list[Note]]:
    """Which tensors `host_lengths` reads in this thread meanwhile."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def capture(driver: Driver, fn: Callable[[], T]) -> tuple[ToldGraph, T]:
    """As `driver.capture`."""
    with noted() as notes:
        graph, result = driver.capture(fn)
    return ToldGraph(graph, notes), result


class ToldGraph:
    """A graph, and what it is told before each replay."""

    def __init__(self, graph: Graph, notes: list[Note]) -> None:
        self._graph, self._notes = graph, notes

    def replay(self) -> None:
        if self._notes:
            self._graph.update([{argument: lengths.tolist()} for argument, lengths in self._notes])
        self._graph.replay()
