"""How many tokens a step computes, and where a prompt is cut."""

from __future__ import annotations

import sys
from typing import NamedTuple

from sglang_core.types import Req


class Chunk(NamedTuple):
    """Known tokens `[start, stop)` of a req, computed in one step."""

    req: Req
    start: int
    stop: int


class StepBudget:
    """Tokens that one step may still take. Decodes are in already; prefill chunks share what they leave."""

    def __init__(
        self, num_tokens: int, *, chunked: bool, most: int = sys.maxsize, recurrent: bool = False, state_pages: int = 0
    ) -> None:
        """most: tokens of one chunk. state_pages: the page size if states are kept at the ends of pages, else 0."""
        self.remaining = num_tokens
        self._chunked = chunked
        self._most = most
        self._recurrent, self._state_pages = recurrent, state_pages
        self._untouched = True

    def take(self, req: Req) -> Chunk | None:
        """The next of the req's known tokens to compute now, or None: no room."""
        start, want = next_extend(req)
        if not self._chunked:
            granted = want if want <= self.remaining or self._untouched else 0
        elif self._recurrent and logprob_start(req) >= 0:  # a token computed again would need the state before it
            granted = want if want <= self.remaining else 0
        else:
            granted = min(want, self.remaining, self._most)
            if self._state_pages:
                granted = self._to_a_page_end(start, start + granted, req.num_tokens) - start
        if start + granted <= req.reserved_len:  # nothing new: no budget, or just the token that is computed again
            return None
        self.remaining -= granted
        self._untouched = False
        return Chunk(req, start, start + granted)

    def _to_a_page_end(self, start: int, stop: int, num_tokens: int) -> int:
        """Where a chunk ends so that its state can be shared: after the last whole page that another req could start from."""
        end = min(stop, num_tokens - 1) // self._state_pages * self._state_pages
        return end if end > start else stop


def logprob_start(req: Req) -> int:
    """First prompt position whose logprob is still owed, -1 for none. They are all delivered with the first token."""
    if req.logprob is None or req.output_ids or req.logprob.logprob_start_len >= len(req.input_ids):
        return -1
    return req.logprob.logprob_start_len


def cacheable_len(req: Req) -> int:
    """How long a cached prefix the req may use: one token is left to compute, and so is what logprobs are made from.

    The logprob of position i comes from the hidden state of position i - 1.
    """
    start = logprob_start(req)
    return req.num_tokens - 1 if start < 0 else min(req.num_tokens - 1, max(0, start - 1))


def next_extend(req: Req) -> tuple[int, int]:
    """Where the req's next chunk begins, and how many known tokens are left from there.

    Where the logprob of the chunk's first token is owed, the token before it is computed again (into the same slot), so that
    an extend holds all that its input logprobs are made from, and no hidden state is carried from step to step.
    """
    start = req.reserved_len
    if start > 0 and 0 <= logprob_start(req) <= start:
        start -= 1
    return start, req.num_tokens - start


def logprob_start_in(chunk: Chunk) -> int:
    """First position of a chunk, not yet in flight, whose input logprob is owed, -1 for none. Earlier chunks gave theirs."""
    req, owed = chunk.req, logprob_start(chunk.req)
    first = max(owed, req.reserved_len)
    return first if owed >= 0 and first < min(chunk.stop, len(req.input_ids)) else -1
