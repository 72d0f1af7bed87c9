"""Who owns which page: the allocator (free), the prefix tree (cached), or one running req.

Pages change hands on the host while steps may still be in flight. That is safe because the device runs steps in the order in
which they were planned: a page freed while processing step n may be read or written by step n + 1, already in flight, and is
written by its next owner in step n + 2 at the earliest, after n + 1 has ended. A step in flight writes only positions at or
after `committed_len`, and the tree takes only whole pages before it, so no cached page is written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import Match, Pages, RadixCache
from sglang_core.types import PoolGroup, Req


def cache_key(req: Req, start: int = 0, stop: int | None = None) -> list[int]:
    """Ids of positions `[start, stop)` as the prefix tree is keyed by them: all known ones by default. Not to be changed."""
    if start == 0 and stop is None and not req.output_ids:  # no copy: the policies ask this of every req that waits
        return req.input_ids if req.cache_ids is None else req.cache_ids
    end = req.num_tokens if stop is None else stop
    if req.cache_ids is None:
        return req.token_ids(start, end)
    return (req.cache_ids + req.output_ids)[start:end]


class PageLedger:
    """Moves pages between the allocators, the prefix tree and the running reqs; every group gets the same columns."""

    def __init__(self, page_size: int, allocators: Mapping[PoolGroup, PageAllocator], cache: RadixCache | None) -> None:
        assert cache is None or (cache.page_size == page_size and set(cache.groups) == set(allocators))
        self.page_size = page_size
        self.cache = cache
        self._allocators = dict(allocators)
        self._first = next(iter(allocators))  # every group lists as many pages a req as this one
        self.num_usable = min(a.num_usable for a in allocators.values())

    @property
    def num_available(self) -> int:
        """Pages that may be granted now, at the cost of evicting."""
        free = min(a.num_free for a in self._allocators.values())
        return free + (self.cache.num_evictable if self.cache else 0)

    @property
    def num_free(self) -> int:
        return min(a.num_free for a in self._allocators.values())

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_missing(self, req: Req, num_tokens: int) -> int:
        """Pages that the req lacks to hold `num_tokens`."""
        return max(0, self.pages_for(num_tokens) - len(req.pages[self._first]))

    def growing(self, reqs: Iterable[Req], num_tokens: int) -> list[Req]:
        """Those that lack pages for `num_tokens` more. On the path of every step."""
        size, group = self.page_size, self._first
        return [req for req in reqs if req.reserved_len + num_tokens > len(req.pages[group]) * size]

    def pin_prefix(self, req: Req, limit: int) -> int:
        """Give a waiting req the longest cached prefix of at most `limit` tokens, pinned. Returns its length."""
        if self.cache is None:
            req.pages = {group: [] for group in self._allocators}
            return 0
        match = self.cache.match(req.namespace, cache_key(req, 0, limit))
        self._take(req, match)
        return match.num_tokens

    def _take(self, req: Req, match: Match) -> None:
        assert self.cache is not None
        self.cache.lock(match.node)
        req.node, req.pages = match.node, match.pages
        req.cached_len = req.committed_len = req.reserved_len = match.num_tokens
        req.sent_pages = 0

    def grow(self, req: Req, num_tokens: int) -> None:
        """Grant the req pages to hold `num_tokens`. The caller knows that so many are available."""
        missing = self.num_missing(req, num_tokens)
        if not missing:
            return
        self._make_free(missing)
        for group, allocator in self._allocators.items():
            req.pages[group] += allocator.alloc(missing)

    def commit(self, req: Req) -> None:
        """Give the tree the req's whole committed pages, and pin them.

        Where the tree got the same tokens from another req meanwhile, its pages replace the req's own, which are freed at once:
        the shared copy is pinned anyway, and a page table is cheaper to send again than pages are to hold twice.
        """
        stop = req.committed_len // self.page_size * self.page_size
        if self.cache is None or stop <= req.cached_len:
            return
        first, last = req.cached_len // self.page_size, stop // self.page_size
        mine = {group: pages[first:last] for group, pages in req.pages.items()}
        given = self.cache.insert(req.namespace, cache_key(req, req.cached_len, stop), mine, below=req.node)
        if any(given.duplicates.values()):
            for group, pages in given.pages.items():
                req.pages[group][first:last] = pages
            self._free(given.duplicates)
            req.sent_pages = min(req.sent_pages, first)
        self.cache.lock(given.node)
        self.cache.unlock(req.node)
        req.node, req.cached_len = given.node, stop

    def release(self, req: Req) -> None:
        """Take every page from the req: whole committed ones go to the tree, the others are freed."""
        self.commit(req)
        self.drop(req)

    def drop(self, req: Req) -> None:
        """Take every page from the req and give the tree none."""
        self._free({group: pages[req.cached_len // self.page_size :] for group, pages in req.pages.items()})
        if self.cache is not None and req.node is not None:
            self.cache.unlock(req.node)
        req.node, req.pages = None, {}
        req.cached_len = req.committed_len = req.reserved_len = req.sent_pages = 0

    def flush(self) -> None:
        """Empty the tree of all that no req pins."""
        if self.cache is not None:
            self._free(self.cache.reset())

    def _make_free(self, num_pages: int) -> None:
        short = num_pages - self.num_free
        if short > 0 and self.cache is not None:
            self._free(self.cache.evict(short))

    def _free(self, pages: Pages) -> None:
        for group, ids in pages.items():
            self._allocators[group].free(ids)
