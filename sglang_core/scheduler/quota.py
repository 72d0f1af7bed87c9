"""Groups of which a req needs a bounded number of pages at once, however long it gets: windowed ones and states.

Each running req has a quota of them, and quotas are granted only while their sum fits the pool. A req holds (owns, or pins in
the prefix tree) no more than its quota, so what is not held by anyone is free or can be evicted, and whoever is below its quota
gets a page. Nobody is retracted for these groups and no prompt stalls. Where two reqs pin the same page it counts twice: the
price is a few pages that could have been granted, never one that is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from sglang_core.errors import ConfigError
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.state_slots import num_state_slots
from sglang_core.types import GroupSpec, PoolGroup, Req

SMALLEST_CHUNK = 2  # one with input logprobs computes a token again


class Quotas:
    """How many pages of each bounded group a req may hold, and how many are promised in all."""

    def __init__(self, config: SchedulerConfig, usable: Mapping[PoolGroup, int], *, cached: bool) -> None:
        """usable: pages of each group in all. Raises ConfigError where one req alone might need more."""
        self._config = config
        self._usable = usable
        self._windows = {g.name: g.window for g in config.groups if g.window is not None}
        # The window is kept of the last page end, where others may go on.
        self._slack = config.page_size - 1 if cached else 0
        self._states = tuple(g.name for g in config.groups if g.kind == "state")
        # Its own, and the tree's that it begins from.
        self._state_quota = num_state_slots(config.max_in_flight, cached=cached) + cached
        self._promised = dict.fromkeys((*self._windows, *self._states), 0)
        self.largest_chunk = min((self._chunk_that_fits(g) for g in config.groups), default=config.context_length)

    def __bool__(self) -> bool:
        return bool(self._promised)

    def of(self, req: Req, *, decoding: bool = False) -> dict[PoolGroup, int]:
        """What a req needs at most from now on: while it computes known tokens, or once it only decodes."""
        config = self._config
        extend = config.max_in_flight * config.tokens_per_step
        if not decoding:
            ahead = config.max_in_flight * min(config.token_budget, self.largest_chunk)
            known = req.num_tokens + (config.max_in_flight - 1) * config.tokens_per_step  # and what decodes behind it
            extend = max(extend, min(known, ahead) if config.chunked else known)
        longest = max(req.num_tokens, req.max_len + config.tokens_per_step - 2)
        all_pages = -(-longest // config.page_size)
        quota = {
            g: min(all_pages, self._pages_of(window + self._slack + extend)) for g, window in self._windows.items()
        }
        return quota | dict.fromkeys(self._states, self._state_quota)

    def fits(self, req: Req) -> bool:
        """Whether a waiting req's quota can be granted."""
        return all(self._promised[g] + n <= self._usable[g] for g, n in self.of(req).items())

    def grant(self, req: Req, *, decoding: bool = False) -> None:
        """Give a req its quota, in place of one that it may have."""
        self.withdraw(req)
        req.quota = self.of(req, decoding=decoding)
        for group, count in req.quota.items():
            self._promised[group] += count

    def withdraw(self, req: Req) -> None:
        for group, count in req.quota.items():
            self._promised[group] -= count
        req.quota = {}

    def _pages_of(self, num_tokens: int) -> int:
        """Pages that adjacent tokens touch at most, wherever they begin."""
        size = self._config.page_size
        return (num_tokens + size - 2) // size + 1

    def _chunk_that_fits(self, group: GroupSpec) -> int:
        """The most known tokens that one req may compute in a step, for the pages behind and in it to fit the pool."""
        config, usable = self._config, self._usable[group.name]
        if group.kind == "state" and usable < self._state_quota:
            raise ConfigError(
                f"pool {group.name!r} has {usable} slots and one request needs {self._state_quota}; "
                "raise --mem-fraction-static or lower --max-running-requests"
            )
        longest = min(
            [n for g in config.groups if g.kind == "full" and (n := self._usable[g.name])], default=sys.maxsize
        )
        longest = min(longest, -(-config.context_length // config.page_size))
        if group.window is None or longest <= usable or not config.chunked:
            return config.context_length
        behind = group.window + self._slack
        chunk = ((usable - 1) * config.page_size + 1 - behind) // config.max_in_flight
        least = max(SMALLEST_CHUNK, config.tokens_per_step)
        if chunk < least:
            need = self._pages_of(behind + config.max_in_flight * least)
            raise ConfigError(
                f"pool {group.name!r} has {usable} pages and one request needs {need}: a window of {group.window} tokens in "
                f"pages of {config.page_size}; raise --max-total-tokens or --mem-fraction-static"
            )
        return chunk
