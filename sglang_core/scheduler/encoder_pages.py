"""Pages with an encoder's output, which a decoder attends to: written once, of a length known when a req starts.

They are kept by content: reqs with the same picture or recording share them, and they stay when nobody uses them until the room
is needed, the ones used longest ago first. A req has all of them from its start to its end, so nothing grows and nobody is retracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.types import Req


@dataclass(slots=True)
class EncoderOutput:
    pages: list[int]
    num_users: int = 0  # running reqs


class EncoderPages:
    """Who has which pages of the cross-attention group."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator, self._page_size = allocator, page_size
        self._outputs: dict[str, EncoderOutput] = {}  # by content; the one used longest ago first

    @property
    def num_evictable(self) -> int:
        return sum(len(output.pages) for output in self._outputs.values() if not output.num_users)

    @property
    def max_tokens(self) -> int:
        """The longest output that the pool can hold."""
        return self._allocator.num_usable * self._page_size

    def fits(self, req: Req) -> bool:
        """Whether a waiting req's output is there or finds room."""
        if req.encoder_key in self._outputs:
            return True
        return self._pages_for(req) <= self._allocator.num_free + self.num_evictable

    def take(self, req: Req) -> None:
        """Give a req that starts its pages. `encoder_is_new` tells that they are to be written first. Fits, see above."""
        if not req.encoder_len:
            return
        output = self._outputs.pop(req.encoder_key, None)
        req.encoder_is_new = output is None
        if output is None:
            output = EncoderOutput(self._alloc(self._pages_for(req)))
        self._outputs[req.encoder_key] = output
        output.num_users += 1
        req.encoder_pages = output.pages

    def give_back(self, req: Req) -> None:
        """The req no longer runs. Steps of it in flight come before any that write to these pages."""
        if req.encoder_pages:
            self._outputs[req.encoder_key].num_users -= 1
            req.encoder_pages = []

    def flush(self) -> None:
        """Forget what no req uses."""
        self._evict(self.num_evictable)

    def _pages_for(self, req: Req) -> int:
        return -(-req.encoder_len // self._page_size)

    def _alloc(self, count: int) -> list[int]:
        self._evict(count - self._allocator.num_free)
        return self._allocator.alloc(count)

    def _evict(self, num_pages: int) -> None:
        for key in [key for key, output in self._outputs.items() if not output.num_users]:
            if num_pages <= 0:
                return
            pages = self._outputs.pop(key).pages
            self._allocator.free(pages)
            num_pages -= len(pages)
