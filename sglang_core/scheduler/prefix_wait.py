"""Which waiting reqs should wait for a prefix that a running req is computing, instead of computing it too."""

from __future__ import annotations

from collections.abc import Hashable

from sglang_core.cache.radix import common_pages
from sglang_core.scheduler.cache_key import cache_key
from sglang_core.scheduler.chunked_prefill import cacheable_len
from sglang_core.types import Req


class PrefixesInProgress:
    """Running reqs whose known tokens are not all committed, and the waiting reqs that wait for their prefix.

    A waiting req waits only for a req that runs, and a running req waits for nobody, so there is no cycle. When the
    running one is aborted or retracted it leaves here, and whoever waited for it computes the prefix itself.
    """

    def __init__(self, page_size: int, min_tokens: int) -> None:
        self._page_size = page_size
        self._min_tokens = max(page_size, min_tokens)
        self._reqs: dict[
            str, tuple[Req, int]
        ] = {}  # rid -> the req, and how much of its prefix was cached when it began
        self._frontier: dict[Hashable, list[tuple[Req, int]]] = {}
        self._waits: dict[
            str, tuple[Req, int]
        ] = {}  # rid -> the req it waits for, and until how much of that is cached

    def __contains__(self, rid: str) -> bool:
        return rid in self._reqs

    def __bool__(self) -> bool:
        return bool(self._reqs)

    def add(self, req: Req) -> None:
        """`req` begins to compute its prefix, from what is cached of it."""
        entry = self._reqs[req.rid] = (req, req.cached_len)
        self._frontier.setdefault(self._next_page(req), []).append(entry)

    def discard(self, rid: str) -> None:
        """The req computed its prefix, or it no longer runs or waits."""
        self._reqs.pop(rid, None)
        self._waits.pop(rid, None)

    def refresh(self) -> None:
        """Find again where each computed prefix ends in the tree: chunks were committed, reqs came and went."""
        self._frontier = {}
        for entry in self._reqs.values():
            self._frontier.setdefault(self._next_page(entry[0]), []).append(entry)

    def is_waiting(self, req: Req) -> bool:
        """Whether what `req` was told to wait for is still being computed. O(1): a queue may hold thousands of such."""
        if req.rid not in self._waits:
            return False
        other, until = self._waits[req.rid]
        running = self._reqs.get(other.rid)
        if running is not None and running[0] is other and other.cached_len < until:
            return True
        del self._waits[req.rid]
        return False

    def should_wait(self, req: Req) -> bool:
        """Whether a running req computes a prefix that `req`, just pinned to what is cached of it, would compute again.

        What counts is all that the other computes of it, not what is left of that: a wait goes on until its end.
        """
        for other, began in self._frontier.get(self._next_page(req), ()):
            mine, theirs = cache_key(req, req.cached_len, cacheable_len(req)), cache_key(other, req.cached_len)
            shared = common_pages(mine, theirs, self._page_size)
            until = req.cached_len + shared
            if shared and until - began >= self._min_tokens:
                self._waits[req.rid] = other, until
                return True
        return False

    def _next_page(self, req: Req) -> Hashable:
        """What two reqs have in common exactly if their prefixes are the same one page beyond what both have cached."""
        page = cache_key(req, req.cached_len, req.cached_len + self._page_size)
        return req.namespace, id(req.node), tuple(page)
