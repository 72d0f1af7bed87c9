"""The scheduler: takes reqs in, plans steps, and turns their results into outputs. A pure state machine over host integers.

A req is in one place at a time: waiting; prefilling, while known tokens of it are still to be planned; decoding, when all are
planned, whether or not the device has run them yet. Steps in flight form a queue of at most `max_in_flight`; their results
come back in order. Which pages may change hands while steps are in flight is said in pages.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.errors import RequestError
from sglang_core.scheduler import intake
from sglang_core.scheduler.adapter_slots import AdapterSlots
from sglang_core.scheduler.admission import Admission
from sglang_core.scheduler.chunked_prefill import Chunk, StepBudget, logprob_start
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.pages import PageLedger
from sglang_core.scheduler.plan import build_batch
from sglang_core.scheduler.policy import POLICIES
from sglang_core.scheduler.prefix_wait import PrefixesInProgress
from sglang_core.scheduler.reserve import OutputReserve
from sglang_core.scheduler.retraction import retraction_order
from sglang_core.scheduler.stopping import accept, truncate
from sglang_core.scheduler.waiting import WaitingQueue
from sglang_core.types import Batch, FinishReason, PoolGroup, Req, ReqOutput, ReqStatus, StepResult, TokenLogprobs


class Scheduler:
    """Who runs next. The engine calls `schedule`, runs the batch, and hands its result to `process_results`, in order."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: RadixCache | None,
        allocators: Mapping[PoolGroup, PageAllocator],
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self._clock = clock
        self._ledger = PageLedger(config, allocators, cache)
        self._prefixes = PrefixesInProgress(
            config.page_size, config.prefix_wait_tokens if cache is not None else sys.maxsize
        )
        self._reserve = OutputReserve(config.output_reserve)
        self._queue = WaitingQueue(POLICIES[config.policy](cache), config.fair_every)
        self.adapters = AdapterSlots(config.num_adapter_slots)
        self._admission = Admission(self._queue, self._ledger, self._prefixes, self._reserve, self.adapters)
        self._reqs: dict[str, Req] = {}  # every req that has not ended
        self._prefilling: dict[str, Req] = {}
        self._decoding: dict[str, Req] = {}
        self._in_flight: deque[Batch] = deque()
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._input_logprobs: dict[str, list[TokenLogprobs]] = {}  # kept until the req's first token
        self._bounded = bool(self._ledger.quotas)
        self._pool_tokens = self._ledger.max_tokens - (config.tokens_per_step - 1)
        self._step = 0
        self._num_added = 0
        self._num_prompt_tokens = 0  # of admitted reqs
        self._num_cached_tokens = 0
        self._num_output_tokens = 0
        self._num_retractions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._reqs or self._in_flight)

    @property
    def can_run(self) -> bool:
        """Whether a req runs or may start: not all there are wait for something that is not the device."""
        return bool(self.num_running or self._queue.has_ready)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def add_req(self, req: Req) -> list[ReqOutput]:
        """Queue a req. Raises RequestError for one that could never run, QueueFullError where the queue is full."""
        if req.rid in self._reqs:
            raise RequestError(f"rid {req.rid!r} is in use by a running request", param="rid", code="duplicate_rid")
        intake.check(
            req,
            self.config,
            len(self._queue),
            len(self._free_slots),
            self._pool_tokens,
            min(self.config.token_budget, self._ledger.quotas.largest_chunk) if self.config.chunked else sys.maxsize,
            0 if self._ledger.encoders is None else self._ledger.encoders.max_tokens,
        )
        intake.settle(req, self.config, self._pool_tokens, self._clock(), self._num_added)
        self._num_added += 1
        self._reqs[req.rid] = req
        self._queue.add(req)
        return []

    def abort(self, rid: str) -> list[ReqOutput]:
        """End a req, or every one for "", at any point of its life. Rows of it that are in flight are void."""
        found = list(self._reqs.values()) if rid == "" else [self._reqs[rid]] if rid in self._reqs else []
        reason = FinishReason("abort", message="aborted by the client")
        return [self._finish(req, reason) for req in found]

    def finish_at(self, rid: str, num_output_tokens: int, matched: str) -> list[ReqOutput]:
        """End a req at a stop string, which is complete with its first `num_output_tokens` tokens. Too late is fine."""
        req = self._reqs.get(rid)
        if req is None:
            return []
        truncate(req, num_output_tokens)
        return [self._finish(req, FinishReason("stop", matched=matched))]

    def fail(self, rid: str, message: str, status: int) -> list[ReqOutput]:
        """End a req, if it has not ended, that turned out not to be able to run."""
        req = self._reqs.get(rid)
        return [] if req is None else [self._finish(req, FinishReason("abort", message=message, status=status))]

    def uses_adapter(self, adapter: str) -> bool:
        """Whether a req with this adapter waits or runs."""
        return any(req.adapter == adapter for req in self._reqs.values())

    def release_hold(self, rid: str, hold: str) -> None:
        """One reason less for a waiting req not to start."""
        if rid in self._reqs:
            self._reqs[rid].holds.discard(hold)

    def schedule(self) -> Batch | None:
        """The next step given what is in flight, or None: nothing can run before a result or a new req."""
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        decodes, growing = self._decodes()
        retract = self._short_of_pages(growing)
        if retract:
            if self._in_flight:
                return None  # let the pipeline drain first: a req may end, and retracting needs no account of void rows
            decodes, growing = self._retract()
        for req in growing:
            self._ledger.grow(req, req.reserved_len + self.config.tokens_per_step)
        budget = StepBudget(
            self.config.token_budget - len(decodes),
            chunked=self.config.chunked,
            most=self._ledger.quotas.largest_chunk,
            recurrent=self.config.recurrent,
            state_pages=self.config.page_size if self.config.recurrent and self._ledger.cache is not None else 0,
        )
        chunks = [chunk for req in self._prefilling.values() if (chunk := budget.take(req))]
        started = [] if retract else self._start(budget)
        if not (decodes or chunks or started):
            return None
        if self._bounded:
            for chunk in chunks + started:
                self._ledger.reach(chunk.req, chunk.stop)
        entered, writes = [chunk.req for chunk in started], self.adapters.take_writes()
        batch = build_batch(self._step, decodes, chunks + started, entered, writes)
        for chunk in batch_ends(chunks + started):
            del self._prefilling[chunk.req.rid]
            self._decoding[chunk.req.rid] = chunk.req
        self._step += 1
        self._reserve.step()
        self._in_flight.append(batch)
        return batch

    def process_results(self, batch: Batch, result: StepResult) -> list[ReqOutput]:
        """Take the result of the oldest step in flight. One output a req that got tokens or ended."""
        assert self._in_flight and self._in_flight[0] is batch, "results are processed in the order of the steps"
        assert result.step == batch.plan.step
        self._in_flight.popleft()
        plan, outputs = batch.plan, []
        some_owe_prefixes = bool(self._prefixes)
        rows = zip(batch.reqs, plan.prefix_lens, plan.extend_lens, plan.sample, strict=True)
        for row, (req, start, extend, samples) in enumerate(rows):
            if req.status is not ReqStatus.RUNNING:
                continue  # it ended while this step was in flight, so the row is void
            req.committed_len = start + extend
            if some_owe_prefixes and req.rid in self._prefixes:
                self._chunk_committed(req, row, result)
            elif self._bounded:
                self._ledger.advance(req)
            if samples:
                outputs.append(self._take_tokens(req, row, result))
            elif req.committed_len == req.num_tokens:  # the last chunk gives no token where max_new_tokens is 0
                outputs.append(self._finish(req, FinishReason("length")))
        return outputs

    def flush_cache(self) -> bool:
        """Forget every cached prefix. Refused, with nothing changed, while a req runs on them."""
        if self.num_running:
            return False
        self._ledger.flush()
        return True

    def usage(self, group: PoolGroup) -> tuple[int, int, int]:
        """Of a pool group: pages that are free, that could be by evicting, and in all."""
        return self._ledger.usage(group)

    def stats(self) -> dict[str, float]:
        """Gauges and totals, by the names under which they are exported."""
        prompt = self._num_prompt_tokens
        usage = {group.name: self._ledger.usage(group.name) for group in self.config.groups}
        free, available, usable = usage[self._ledger.main_group]
        return {
            "running": self.num_running,
            "waiting": self.num_waiting,
            "in_flight": len(self._in_flight),
            "token_usage": 1.0 - available / usable,
            "cache_hit_rate": self._num_cached_tokens / prompt if prompt else 0.0,
            "prompt_tokens": prompt,
            "cached_tokens": self._num_cached_tokens,
            "output_tokens": self._num_output_tokens,
            "retractions": self._num_retractions,
            "output_reserve": self._reserve.ratio,
            "free_pages": free,
            "available_pages": available,
        } | {f"pool_usage_{group}": 1.0 - could / total for group, (_, could, total) in usage.items()}

    def _decodes(self) -> tuple[list[Req], list[Req]]:
        """Reqs that extend by one token, and those of them that lack pages to.

        One whose last token is in flight already is left out, not run past its length.
        """
        decodes = [req for req in self._decoding.values() if req.reserved_len < req.max_len - 1]
        return decodes, self._ledger.growing(decodes, self.config.tokens_per_step)

    def _short_of_pages(self, growing: Iterable[Req]) -> bool:
        wanted = self.config.tokens_per_step
        missing = sum(self._ledger.num_missing(req, req.reserved_len + wanted) for req in growing)
        return missing > self._ledger.num_available

    def _retract(self) -> tuple[list[Req], list[Req]]:
        """Send reqs back to waiting until the others can decode, and list those. The last one always can."""
        victims = []
        decodes, growing = self._decodes()
        for req in retraction_order([*self._prefilling.values(), *self._decoding.values()])[:-1]:
            self._leave_slot(req)
            self._input_logprobs.pop(req.rid, None)
            req.num_retractions += 1
            victims.append(req)
            decodes, growing = self._decodes()
            if not self._short_of_pages(growing):
                break
        self._queue.put_back(victims)
        self._reserve.retracted()
        self._num_retractions += len(victims)
        return decodes, growing

    def _start(self, budget: StepBudget) -> list[Chunk]:
        if not len(self._queue):
            return []
        running = [*self._prefilling.values(), *self._decoding.values()]
        chunks = self._admission.admit(running, budget, len(self._free_slots))
        for req, _, _ in chunks:
            req.status = ReqStatus.RUNNING
            req.slot = self._free_slots.pop()
            self._prefilling[req.rid] = req
            if not req.output_ids and not req.num_retractions:
                req.num_cached_tokens = req.cached_len
                self._num_cached_tokens += req.cached_len
                self._num_prompt_tokens += len(req.input_ids)
        return chunks

    def _chunk_committed(self, req: Req, row: int, result: StepResult) -> None:
        """Share what is computed so far. Not halfway where logprobs are owed: the next chunk writes its last token again."""
        if result.input_logprobs is not None and result.input_logprobs[row]:
            self._input_logprobs.setdefault(req.rid, []).extend(result.input_logprobs[row])
        done = req.committed_len >= req.num_tokens
        if done or logprob_start(req) < 0:
            self._ledger.commit(req)
        if self._bounded:
            self._ledger.advance(req)
        if done:
            self._ledger.decodes(req)
            self._prefixes.discard(req.rid)

    def _take_tokens(self, req: Req, row: int, result: StepResult) -> ReqOutput:
        tokens = result.token_ids[row][: result.num_accepted[row]]
        req.num_in_flight -= 1
        num_taken, reason = accept(req, tokens)
        self._num_output_tokens += num_taken
        if num_taken > 1:  # the KV of all but the newest was computed with them
            req.committed_len += num_taken - 1
            req.reserved_len += num_taken - 1
            if self._bounded:
                self._ledger.advance(req)
        logprobs = result.logprobs[row][:num_taken] if result.logprobs is not None else []
        if reason is not None:
            return self._finish(req, reason, tokens[:num_taken], logprobs)
        if not (logprobs or self._input_logprobs):
            return ReqOutput(rid=req.rid, token_ids=tokens, num_cached_tokens=req.num_cached_tokens)
        return ReqOutput(
            rid=req.rid,
            token_ids=tokens,
            num_cached_tokens=req.num_cached_tokens,
            logprobs=logprobs,
            input_logprobs=self._input_logprobs.pop(req.rid, []),
        )

    def _finish(
        self,
        req: Req,
        reason: FinishReason,
        tokens: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> ReqOutput:
        """The one place where a req ends, so that it does so exactly once."""
        if req.status is ReqStatus.RUNNING:
            self._leave_slot(req)
        self._queue.discard(req)
        self._prefixes.discard(req.rid)
        del self._reqs[req.rid]
        req.status, req.finish_reason = ReqStatus.FINISHED, reason
        return ReqOutput(
            rid=req.rid,
            token_ids=tokens or [],
            finish_reason=reason,
            num_cached_tokens=req.num_cached_tokens,
            logprobs=logprobs or [],
            input_logprobs=self._input_logprobs.pop(req.rid, []),
        )

    def _leave_slot(self, req: Req) -> None:
        """Stop running: its pages go to the tree or are freed, its slot is the next req's."""
        self._ledger.release(req)
        self._prefixes.discard(req.rid)
        self._prefilling.pop(req.rid, None)
        self._decoding.pop(req.rid, None)
        self._free_slots.append(req.slot)
        self.adapters.release(req.adapter)
        req.slot, req.adapter_slot, req.num_in_flight = -1, -1, 0


def batch_ends(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Chunks that reach the last known token, so that the req decodes from the next step on."""
    return [chunk for chunk in chunks if chunk.stop == chunk.req.num_tokens]
