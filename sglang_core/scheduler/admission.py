"""Which waiting reqs start in this step."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_core.scheduler.adapter_slots import AdapterSlots
from sglang_core.scheduler.chunked_prefill import Chunk, StepBudget, cacheable_len
from sglang_core.scheduler.pages import PageLedger
from sglang_core.scheduler.prefix_wait import PrefixesInProgress
from sglang_core.scheduler.reserve import OutputReserve
from sglang_core.scheduler.waiting import WaitingQueue
from sglang_core.types import Req


class Admission:
    """Offers places to waiting reqs in the queue's order until the first that does not fit.

    Nobody slips past a req that lacks pages or budget, or a long prompt would never start. Only a req that waits for another's
    prefix, or for a slot for its adapter, is passed, and the latter not for ever. A req gets the pages of all its known tokens
    at once, so a prompt never stalls halfway.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        ledger: PageLedger,
        prefixes: PrefixesInProgress,
        reserve: OutputReserve,
        adapters: AdapterSlots,
    ) -> None:
        self._queue = queue
        self._ledger = ledger
        self._prefixes = prefixes
        self._reserve = reserve
        self._adapters = adapters

    def admit(self, running: Sequence[Req], budget: StepBudget, num_slots: int) -> list[Chunk]:
        """First chunks of the reqs that start, which hold their pages then and have left the queue."""
        if not num_slots or budget.remaining <= 0:
            return []
        self._prefixes.refresh()
        chunks: list[Chunk] = []
        expected = self._reserve.pages(running, self._ledger.page_size)
        for req in self._queue.candidates():
            if len(chunks) == num_slots or budget.remaining <= 0:
                break
            if self._prefixes.is_waiting(req):
                continue
            if not self._adapters.has_room(req.adapter):
                if self._queue.is_due(req):
                    break
                continue
            self._ledger.pin_prefix(req, cacheable_len(req))
            if self._prefixes.should_wait(req):
                self._ledger.drop(req)
                continue
            own = self._reserve.pages((req,), self._ledger.page_size)
            fits = self._fits(req, expected + own, alone=not running and not chunks)
            chunk = budget.take(req) if fits else None
            if chunk is None:
                self._ledger.drop(req)
                break
            self._ledger.start(req)
            self._prefixes.add(req)
            expected += own
            chunks.append(chunk)
            req.adapter_slot = self._adapters.acquire(req.adapter)
        for chunk in chunks:
            self._queue.started(chunk.req)
        return chunks

    def _fits(self, req: Req, expected: int, *, alone: bool) -> bool:
        """Whether its known tokens fit, and leave what running reqs are expected to write. Alone it need not leave any."""
        if not self._ledger.has_room(req):
            return False
        left = self._ledger.num_available - self._ledger.num_missing(req, req.num_tokens)
        return left >= (0 if alone else expected)
