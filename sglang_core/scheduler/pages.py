"""Who owns which page: the allocator (free), the prefix tree (cached), or one running req.

Pages change hands on the host while steps may still be in flight. That is safe because the device runs steps in the order in
which they were planned: a page freed while processing step n may be read or written by step n + 1, already in flight, and is
written by its next owner in step n + 2 at the earliest, after n + 1 has ended. A step in flight writes only positions at or
after `committed_len`, and the tree takes only whole pages before it, so no cached page is written again.

Groups differ in when a req has and lets go of pages. Of a full group it gets those of all its known tokens when it starts, and
has them until it ends. Of a windowed group it gets those of a chunk with the chunk, and lets go of what the window has left
behind with each result: to the tree what it took, else to the allocator. Of states it has a few for its whole run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from sglang_core.cache.page_allocator import SCRATCH_PAGE, PageAllocator
from sglang_core.cache.radix import Match, Pages, RadixCache
from sglang_core.scheduler.cache_key import cache_key
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.encoder_pages import EncoderPages
from sglang_core.scheduler.quota import Quotas
from sglang_core.scheduler.state_slots import NO_STATE, StateSlots, num_state_slots
from sglang_core.types import PoolGroup, Req


class PageLedger:
    """Moves pages between the allocators, the prefix tree and the running reqs."""

    def __init__(
        self, config: SchedulerConfig, allocators: Mapping[PoolGroup, PageAllocator], cache: RadixCache | None
    ) -> None:
        names = {group.name for group in config.groups}
        assert names == set(allocators), f"allocators of {set(allocators)} for the groups {names}"
        assert cache is None or (
            cache.page_size == config.page_size and set(cache.groups) == {g.name for g in config.tree_groups}
        )
        self.page_size = config.page_size
        self.cache = cache
        self._allocators = dict(allocators)
        self._full = [group.name for group in config.groups if group.kind == "full"]
        self._windows = {group.name: group.window for group in config.groups if group.window is not None}
        self._state = next((group.name for group in config.groups if group.kind == "state"), None)
        cross = next((group.name for group in config.groups if group.kind == "cross"), None)
        self._cross = cross
        self.encoders = None if cross is None else EncoderPages(allocators[cross], config.page_size)
        self._paged = [*self._full, *self._windows]
        self.main_group = self._paged[0]  # while a req decodes, every group lists as many columns as this one
        self._num_states = num_state_slots(config.max_in_flight, cached=cache is not None)
        self.quotas = Quotas(config, {g: a.num_usable for g, a in allocators.items()}, cached=cache is not None)
        kept_whole = self._paged if not config.chunked else self._full
        self.max_tokens = min((allocators[g].num_usable for g in kept_whole), default=sys.maxsize) * self.page_size

    @property
    def num_available(self) -> int:
        """Pages of full groups that may be granted now, at the cost of evicting. Bounded groups have quotas instead."""
        free = min((self._allocators[group].num_free for group in self._full), default=sys.maxsize)
        return free + (self.cache.num_evictable if self.cache else 0)

    def usage(self, group: PoolGroup) -> tuple[int, int, int]:
        """Of a group: pages that are free, that could be by evicting, and in all."""
        allocator, evictable = self._allocators[group], 0
        if group == self._cross and self.encoders is not None:
            evictable = self.encoders.num_evictable
        elif self.cache is not None:
            loose = self.cache.loose.get(group)
            evictable = self.cache.num_evictable if loose is None else loose.num_evictable
        return allocator.num_free, allocator.num_free + evictable, allocator.num_usable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_missing(self, req: Req, num_tokens: int) -> int:
        """Pages that the req lacks to hold `num_tokens` in full groups."""
        return max(0, self.pages_for(num_tokens) - len(req.pages[self._full[0]])) if self._full else 0

    def growing(self, reqs: Iterable[Req], num_tokens: int) -> list[Req]:
        """Those that lack pages for `num_tokens` more. On the path of every step."""
        size, group = self.page_size, self.main_group
        return [req for req in reqs if req.reserved_len + num_tokens > len(req.pages[group]) * size]

    def pin_prefix(self, req: Req, limit: int) -> int:
        """Give a waiting req the longest cached prefix of at most `limit` tokens, pinned. Returns its length."""
        req.sent_pages = dict.fromkeys(self._paged, 0)
        if self.cache is None:
            req.pages = {group: [] for group in self._paged}
            req.first_pages = dict.fromkeys(self._windows, 0)
            return 0
        match = self.cache.match(req.namespace, cache_key(req, 0, limit))
        self._take(req, match)
        return match.num_tokens

    def _take(self, req: Req, match: Match) -> None:
        assert self.cache is not None
        self.cache.lock(match.node)
        req.node, req.pages = match.node, {group: match.pages[group] for group in self._paged}
        req.cached_len = req.committed_len = req.reserved_len = match.num_tokens
        if self.cache.loose:
            req.held_tail = self.cache.pin_tail(match.node)
            req.first_pages = {g: max(0, match.num_tokens - w) // self.page_size for g, w in self._windows.items()}

    def has_room(self, req: Req) -> bool:
        """Whether a waiting req's quotas fit, and what an encoder made for it."""
        return self.quotas.fits(req) and (self.encoders is None or self.encoders.fits(req))

    def start(self, req: Req) -> None:
        """Grant a waiting req what it runs with: pages of full groups for all known tokens, its quotas, an encoder's output."""
        if self.encoders is not None:
            self.encoders.take(req)
        self._grow(req, self._full, req.num_tokens)
        if self.quotas:
            self.quotas.grant(req)
        if self._state is not None:
            owned, shared = self._alloc(self._state, self._num_states), req.held_tail.get(self._state, [])
            keep = self.cache is not None
            req.states = StateSlots(owned, self.page_size, shared=shared[0] if shared else NO_STATE, keep=keep)

    def reach(self, req: Req, stop: int) -> None:
        """Grant the pages of windowed groups for a chunk that ends at `stop`."""
        self._grow(req, self._windows, stop)

    def grow(self, req: Req, num_tokens: int) -> None:
        """Grant the req pages to hold `num_tokens`. The caller knows that so many are available."""
        self._grow(req, self._paged, num_tokens)

    def _grow(self, req: Req, groups: Iterable[PoolGroup], num_tokens: int) -> None:
        wanted = self.pages_for(num_tokens)
        for group in groups:
            missing = wanted - len(req.pages[group])
            if missing > 0:
                req.pages[group] += self._alloc(group, missing)

    def commit(self, req: Req) -> None:
        """Give the tree the req's whole committed pages, and pin them.

        Where the tree got the same tokens from another req meanwhile, its pages replace the req's own, which are freed at once:
        the shared copy is pinned anyway, and a page table is cheaper to send again than pages are to hold twice.
        """
        stop = req.committed_len // self.page_size * self.page_size
        if req.states is not None:
            req.states.committed(req.committed_len)
        if self.cache is None or stop <= req.cached_len:
            return
        first, last = req.cached_len // self.page_size, stop // self.page_size
        mine = {group: pages[first:last] for group, pages in req.pages.items()}
        state = req.states.snapshot(stop) if self._state is not None else []
        if self._state is not None:
            mine[self._state] = state
        given = self.cache.insert(req.namespace, cache_key(req, req.cached_len, stop), mine, below=req.node)
        if self._state is not None and given.duplicates.pop(self._state):
            state = []  # the tree has one already, and the req keeps its own
        if any(given.duplicates.values()):
            for group in self._paged:
                req.pages[group][first:last] = given.pages[group]
                req.sent_pages[group] = min(req.sent_pages[group], first)
            self._free(given.duplicates)
        self.cache.lock(given.node)
        tail = self.cache.pin_tail(given.node) if self.cache.loose else {}
        self._unpin(req)
        req.node, req.cached_len, req.held_tail = given.node, stop, tail
        for group, window in self._windows.items():
            req.first_pages[group] = first = max(0, stop - window) // self.page_size
            req.pages[group][:first] = [SCRATCH_PAGE] * first  # the tree's, and not pinned
        if state and self._state is not None:
            req.states.share(state[0])
            req.states.add(*self._alloc(self._state, 1))

    def advance(self, req: Req) -> None:
        """Let go of what the req will not read again, now that more of it is committed. Only bounded groups have such pages."""
        if req.states is not None:
            req.states.committed(req.committed_len)
        end = req.committed_len
        if self.cache is not None:  # it may leave the tree all whole pages, for others to go on from
            end -= end % self.page_size
        for group, window in self._windows.items():
            before, first = req.first_pages[group], max(0, end - window) // self.page_size
            if first > before:
                self._leave_behind(req, group, before, first)

    def _leave_behind(self, req: Req, group: PoolGroup, before: int, first: int) -> None:
        """Columns `[before, first)` of a windowed group are behind the window of whatever token comes next."""
        pages, own = req.pages[group], req.cached_len // self.page_size
        if first > own:
            self._allocators[group].free(pages[max(before, own) : first])
        tail = req.held_tail.get(group, [])
        passed = first - (own - len(tail))  # the tail's columns end where the req's own begin
        if tail and passed > 0:
            assert self.cache is not None
            self.cache.unpin_tail(req.node, group, tail[:passed])
            del tail[:passed]
        pages[before:first] = [SCRATCH_PAGE] * (first - before)
        req.first_pages[group] = first

    def decodes(self, req: Req) -> None:
        """All known tokens of the req are committed: it needs less of bounded groups from now on."""
        if self.quotas:
            self.quotas.grant(req, decoding=True)

    def release(self, req: Req) -> None:
        """Take every page from the req: whole committed ones go to the tree, the others are freed."""
        self.commit(req)
        self.drop(req)

    def drop(self, req: Req) -> None:
        """Take every page from the req and give the tree none."""
        own = req.cached_len // self.page_size
        self._free({g: [p for p in pages[own:] if p != SCRATCH_PAGE] for g, pages in req.pages.items()})
        if self._state is not None and req.states is not None:
            self._allocators[self._state].free(req.states.owned)
        if self.encoders is not None:
            self.encoders.give_back(req)
        self._unpin(req)
        self.quotas.withdraw(req)
        req.node, req.states, req.pages, req.first_pages, req.sent_pages, req.held_tail = None, None, {}, {}, {}, {}
        req.cached_len = req.committed_len = req.reserved_len = 0

    def flush(self) -> None:
        """Empty the tree of all that no req pins, and forget encoder outputs that none uses."""
        if self.encoders is not None:
            self.encoders.flush()
        if self.cache is not None:
            self._free(self.cache.reset())

    def _unpin(self, req: Req) -> None:
        if self.cache is None or req.node is None:
            return
        for group, pages in req.held_tail.items():
            self.cache.unpin_tail(req.node, group, pages)
        self.cache.unlock(req.node)

    def _alloc(self, group: PoolGroup, count: int) -> list[int]:
        """Pages of a group, evicting what is needed of it. The caller knows that so many are available."""
        allocator = self._allocators[group]
        short = count - allocator.num_free
        if short > 0 and self.cache is not None:
            if group in self.cache.loose:
                allocator.free(self.cache.evict_loose(group, short))
            else:
                self._free(self.cache.evict(short))
        return allocator.alloc(count)

    def _free(self, pages: Pages) -> None:
        for group, ids in pages.items():
            self._allocators[group].free(ids)
