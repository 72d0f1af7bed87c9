"""In which order waiting reqs are offered a place. Small classes behind one method; `fair_every` bounds them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Protocol

from sglang_core.cache.radix import Peek, RadixCache, RadixNode
from sglang_core.scheduler.cache_key import cache_key
from sglang_core.types import Req

WINDOW = 128  # reqs that a policy which walks the tree looks at, oldest first: its cost must not grow with the queue


class Policy(Protocol):
    """Orders waiting reqs, given oldest first. May be lazy: the caller stops when the step is full."""

    def order(self, waiting: Iterable[Req]) -> Iterator[Req]: ...


class Fcfs:
    """First come, first served."""

    def __init__(self, cache: RadixCache | None) -> None: ...

    def order(self, waiting: Iterable[Req]) -> Iterator[Req]:
        return iter(waiting)


class Priority:
    """The highest priority first; among equals the oldest."""

    def __init__(self, cache: RadixCache | None) -> None: ...

    def order(self, waiting: Iterable[Req]) -> Iterator[Req]:
        return iter(sorted(waiting, key=lambda req: -req.priority))


class PrefixLookup:
    """What the tree has of each waiting req, looked up once a version of the tree, from where the last look-up ended."""

    def __init__(self) -> None:
        self._version = -1
        self._found: dict[Req, Peek] = {}
        self._before: dict[Req, Peek] = {}  # of the version before; reqs that are no longer asked for drop out

    def __call__(self, cache: RadixCache, req: Req) -> Peek:
        if cache.version != self._version:
            self._version, self._before, self._found = cache.version, self._found, {}
        found = self._found.get(req)
        if found is None:
            found = self._found[req] = cache.peek(req.namespace, cache_key(req), self._before.get(req))
        return found


class LongestPrefixMatch:
    """The req with the most cached tokens first: it costs least, and what it needs may soon be evicted."""

    def __init__(self, cache: RadixCache | None) -> None:
        self._cache = cache
        self._lookup = PrefixLookup()

    def order(self, waiting: Iterable[Req]) -> Iterator[Req]:
        rest = iter(waiting)
        window = list(islice(rest, WINDOW))
        cache = self._cache
        if len(window) > 1 and cache is not None:
            window.sort(key=lambda req: -self._lookup(cache, req).num_tokens)
        return chain(window, rest)


class DfsWeight:
    """Depth first through the prefix tree, the subtree that most reqs wait for first: neighbours run together."""

    def __init__(self, cache: RadixCache | None) -> None:
        self._cache = cache
        self._lookup = PrefixLookup()

    def order(self, waiting: Iterable[Req]) -> Iterator[Req]:
        rest = iter(waiting)
        window = list(islice(rest, WINDOW))
        if len(window) < 2 or self._cache is None:
            return chain(window, rest)
        ends: dict[RadixNode, list[Req]] = {}
        weights: Counter[RadixNode] = Counter()
        for req in window:
            node = self._lookup(self._cache, req).ends_in
            ends.setdefault(node, []).append(req)
            above: RadixNode | None = node
            while above is not None:
                weights[above] += 1
                above = above.parent
        return chain(_depth_first(self._cache.root, weights, ends), rest)


def _depth_first(root: RadixNode, weights: Counter[RadixNode], ends: dict[RadixNode, list[Req]]) -> Iterator[Req]:
    below: dict[RadixNode, list[RadixNode]] = {}
    for node in weights:  # visits only what a waiting req reaches, never the whole tree
        if node.parent is not None:
            below.setdefault(node.parent, []).append(node)
    stack = [(root, False)]
    while stack:
        node, left = stack.pop()
        if left:  # those who share more, further down, were first
            yield from ends.get(node, ())
            continue
        stack.append((node, True))
        stack += [(child, False) for child in sorted(below.get(node, ()), key=lambda child: weights[child])]


POLICIES: Mapping[str, Callable[[RadixCache | None], Policy]] = {
    "fcfs": Fcfs,
    "lpm": LongestPrefixMatch,
    "dfs-weight": DfsWeight,
    "priority": Priority,
}
