"""Pages that may leave the prefix tree while their node stays: those of a windowed group, and states. Host integers only.

A node whose window pages are gone still holds the tokens' other pages, and still leads to nodes whose own are there. So pages
of such a group are pinned one by one and not by path, and leave in the order in which their nodes were last used.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from sglang_core.types import PoolGroup

GONE = 0  # stands where a page was; the scratch page is never cached


class HasPages(Protocol):
    """A node: `pages[group]` is a list in which a page that left is GONE."""

    pages: dict[PoolGroup, list[int]]


N = TypeVar("N", bound=HasPages)


@dataclass(eq=False)
class LoosePages(Generic[N]):
    """The pages of one group that the tree holds: how many, which are pinned, and whose leave first."""

    group: PoolGroup
    rank: Callable[[N], float]  # the lowest leaves first; it may rise when a node is used
    num_pages: int = 0
    _pins: dict[int, int] = field(default_factory=dict)  # page -> how many hold it
    _heap: list[tuple[float, int, N]] = field(default_factory=list)
    _queued: set[N] = field(default_factory=set)  # nodes with an entry in the heap
    _num_pushed: int = 0

    @property
    def num_evictable(self) -> int:
        return self.num_pages - len(self._pins)

    def added(self, node: N, num_pages: int) -> None:
        """`node` holds so many more pages."""
        self.num_pages += num_pages
        self.offer(node)

    def removed(self, num_pages: int) -> None:
        """A node that left, or its end, held so many."""
        self.num_pages -= num_pages

    def pin(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pins[page] = self._pins.get(page, 0) + 1

    def unpin(self, pages: Iterable[int]) -> None:
        """The caller then offers the nodes that hold them."""
        for page in pages:
            count = self._pins[page] - 1
            if count:
                self._pins[page] = count
            else:
                del self._pins[page]

    def offer(self, node: N) -> None:
        """Pages of `node` may leave from now on, unless they are pinned."""
        if node not in self._queued and self._leaving(node):
            self._queued.add(node)
            self._push(node)

    def evict(self, num_pages: int) -> tuple[list[int], list[N]]:
        """Let go of up to so many unpinned pages, the earliest of a node first: its end is read by who goes on from there.

        Returns them, and the nodes that they left.
        """
        freed: list[int] = []
        left: list[N] = []
        while len(freed) < num_pages and self._heap:
            rank, _, node = self._heap[0]
            leaving = self._leaving(node)
            if leaving and (now := self.rank(node)) != rank:
                self._num_pushed += 1
                heapq.heapreplace(self._heap, (now, self._num_pushed, node))
                continue
            taken = leaving[: num_pages - len(freed)]
            held = node.pages[self.group]
            for column in taken:
                freed.append(held[column])
                held[column] = GONE
            if taken:
                left.append(node)
            if len(taken) == len(leaving):
                heapq.heappop(self._heap)
                self._queued.discard(node)
        self.num_pages -= len(freed)
        return freed, left

    def _leaving(self, node: N) -> list[int]:
        """Columns of the pages that nobody holds."""
        pins = self._pins
        return [i for i, page in enumerate(node.pages[self.group]) if page != GONE and page not in pins]

    def _push(self, node: N) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (self.rank(node), self._num_pushed, node))


def covered(pages: list[int], end: int, window: int, page_size: int) -> int:
    """The longest prefix in columns, at most `end`, whose next token finds all that it sees: its last `window - 1` tokens."""
    while end:
        first = max(0, end * page_size - (window - 1)) // page_size
        seen = pages[first:end]
        if GONE not in seen:
            return end
        end -= seen[::-1].index(GONE) + 1  # no prefix that sees this column will do
        while end and pages[end - 1] == GONE:
            end -= 1
    return 0
