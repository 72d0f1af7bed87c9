"""How a KV budget divides between the pools of a model.

The size of everything follows from one number, the tokens that full groups hold. Beside them a windowed group needs pages only
for windows: as many as the reqs that would fill the full groups need, if each is EXPECTED_WINDOWS windows long, with what a
step writes, and a share for cached prefixes. Never more than a page for each page of the full groups. States go by the same
count of reqs. Fewer long reqs leave windows unused and many short ones wait for a place; neither is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_core.backend.pool import PoolSpec
from sglang_core.layers.forward_batch import AnyPoolSpec
from sglang_core.types import PoolGroup

SCRATCH_PAGES = 1  # page 0 of every pool
EXPECTED_WINDOWS = 4
EXPECTED_TOKENS = 4096  # of a req, where windows are short
CACHED_SHARE = 8  # a windowed group has a page in reserve for each so many pages of full groups


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSizes:
    """Pages of each pool. A page of a full or windowed group holds `page_size` tokens, one of states a state."""

    specs: Mapping[PoolGroup, AnyPoolSpec]
    page_size: int
    context_length: int
    max_running: int
    tokens_in_flight: int  # that steps not yet committed may write, all reqs together
    states_per_req: int  # slots that a running req holds at most

    @property
    def bytes_per_token(self) -> int:
        """Of all pools that hold a req's tokens."""
        return sum(self._page_bytes(g) for g in self.specs if self._kind(g) in ("full", "windowed")) // self.page_size

    @property
    def main_group(self) -> PoolGroup:
        """The group that is as large as it is said: the full one; a windowed one where there is no full."""
        return min(self.specs, key=lambda g: ("full", "windowed", "state", "cross").index(self._kind(g)))

    def pages(self, num_pages: int) -> dict[PoolGroup, int]:
        """Of every pool, scratch not counted, where the main group has `num_pages`."""
        reqs = max(1, min(self.max_running, num_pages * self.page_size // self._expected_tokens))
        return {group: self._pages_of(group, num_pages, reqs) for group in self.specs}

    def nbytes(self, num_pages: int) -> int:
        """Of all pools with their scratch pages, where the main group has `num_pages`."""
        return sum((n + SCRATCH_PAGES) * self._page_bytes(g) for g, n in self.pages(num_pages).items())

    def fitting(self, budget: int) -> int:
        """The most pages of the main group that a budget in bytes has room for."""
        low, high = 0, max(0, budget) // self._page_bytes(self.main_group) + 1
        while high - low > 1:  # `low` pages fit, `high` do not
            middle = (low + high) // 2
            low, high = (middle, high) if self.nbytes(middle) <= budget else (low, middle)
        return low

    def useful(self) -> int:
        """Pages of the main group beyond which nothing is gained."""
        every_context = self.max_running * -(-self.context_length // self.page_size)
        window = self.specs[self.main_group].group_spec.window
        if window is None:
            return every_context
        return min(
            every_context, (1 + EXPECTED_WINDOWS) * (self.max_running * self._window_pages(window) + self._ahead)
        )

    @property
    def _ahead(self) -> int:
        return -(-self.tokens_in_flight // self.page_size)

    @property
    def _expected_tokens(self) -> int:
        windows = [spec.group_spec.window or 0 for spec in self.specs.values()]
        return min(self.context_length, max(EXPECTED_WINDOWS * max(windows), EXPECTED_TOKENS))

    def _pages_of(self, group: PoolGroup, num_pages: int, reqs: int) -> int:
        window, kind = self.specs[group].group_spec.window, self._kind(group)
        if group == self.main_group or kind == "full":
            return num_pages
        spec = self.specs[group]
        if isinstance(spec, PoolSpec) and spec.encoder_len is not None:
            return (reqs + 1) * -(-spec.encoder_len // self.page_size)  # one more, for who comes back to it
        if window is None:
            return reqs * (self.states_per_req + 1)  # one more for a cached prefix
        return min(num_pages, reqs * self._window_pages(window) + self._ahead + num_pages // CACHED_SHARE)

    def _window_pages(self, window: int) -> int:
        """Pages that a decoding req holds: those of the window before the last page end, and what follows that."""
        return (window + self.page_size - 2) // self.page_size + 3

    def _kind(self, group: PoolGroup) -> str:
        return self.specs[group].group_spec.kind

    def _page_bytes(self, group: PoolGroup) -> int:
        return self.specs[group].bytes_per_page
