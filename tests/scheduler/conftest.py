"""A scheduler with a device that answers at once, for tests that look at one behaviour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.scheduler import Scheduler, SchedulerConfig
from sglang_core.types import Batch, LogprobParams, Req, ReqOutput, SamplingParams, StepResult, TokenLogprobs

DEFAULTS: dict[str, Any] = {"max_running": 8, "context_length": 512, "page_size": 4, "token_budget": 64}


class Harness:
    """Plans steps and answers them with token 7, or with what a test gives."""

    def __init__(
        self, *, num_pages: int = 200, cached: bool = True, sizes: dict[str, int] | None = None, **config: Any
    ) -> None:
        self.config = SchedulerConfig(**(DEFAULTS | config))
        self.now = 0.0
        self.allocators = {g.name: PageAllocator((sizes or {}).get(g.name, num_pages)) for g in self.config.groups}
        self.allocator = next(iter(self.allocators.values()))
        self.cache = RadixCache(self.config.page_size, self.config.tree_groups) if cached else None
        self.scheduler = Scheduler(self.config, self.cache, self.allocators, self._clock)
        self.outputs: dict[str, list[ReqOutput]] = {}

    def _clock(self) -> float:
        self.now += 1.0
        return self.now

    def add(
        self,
        rid: str,
        ids: list[int],
        *,
        logprob_start_len: int | None = None,
        req: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Req:
        logprob = None if logprob_start_len is None else LogprobParams(logprob_start_len=logprob_start_len)
        made = Req(rid=rid, input_ids=ids, sampling=SamplingParams(**sampling), logprob=logprob, **(req or {}))
        self.keep(self.scheduler.add_req(made))
        return made

    def keep(self, outputs: list[ReqOutput]) -> list[ReqOutput]:
        for out in outputs:
            self.outputs.setdefault(out.rid, []).append(out)
        return outputs

    def answer(self, batch: Batch, tokens: dict[str, list[int]] | None = None) -> list[ReqOutput]:
        """Process the result of `batch`: per rid the tokens given, else one 7, and the input logprobs asked for."""
        rows = [
            (tokens or {}).get(req.rid, [7]) if samples else []
            for req, samples in zip(batch.reqs, batch.plan.sample, strict=True)
        ]
        result = StepResult(
            step=batch.plan.step,
            token_ids=rows,
            num_accepted=[len(row) for row in rows],
            input_logprobs=[
                [TokenLogprobs(p, -1.0) for p in positions] for positions in logprob_positions(batch).values()
            ],
        )
        return self.keep(self.scheduler.process_results(batch, result))

    def plan(self) -> Batch:
        batch = self.scheduler.schedule()
        assert batch is not None
        return batch

    def step(self, tokens: dict[str, list[int]] | None = None) -> Batch:
        batch = self.plan()
        self.answer(batch, tokens)
        return batch

    def run(self) -> list[Batch]:
        """Step until all reqs have ended."""
        batches = []
        while self.scheduler.has_work:
            batches.append(self.step())
            assert len(batches) < 10_000
        return batches

    def tokens(self, rid: str) -> list[int]:
        return [token for out in self.outputs.get(rid, []) for token in out.token_ids]

    def reason(self, rid: str) -> Any:
        ends = [out.finish_reason for out in self.outputs.get(rid, []) if out.finish_reason is not None]
        assert len(ends) == 1, f"{rid} ended {len(ends)} times"
        return ends[0]


def extends(batch: Batch) -> dict[str, tuple[int, int]]:
    """rid -> positions that the step computes."""
    plan = batch.plan
    return {r.rid: (p, p + e) for r, p, e in zip(batch.reqs, plan.prefix_lens, plan.extend_lens, strict=True)}


def logprob_positions(batch: Batch) -> dict[str, range]:
    """rid -> positions whose input logprob the step is asked for."""
    starts = batch.plan.logprob_starts or [-1] * len(batch.reqs)
    ends = {rid: stop for rid, (_, stop) in extends(batch).items()}
    return {r.rid: range(s, ends[r.rid]) if s >= 0 else range(0) for r, s in zip(batch.reqs, starts, strict=True)}


@pytest.fixture
def harness() -> Callable[..., Harness]:
    return Harness


@pytest.fixture(name="extends")
def extends_fixture() -> Callable[[Batch], dict[str, tuple[int, int]]]:
    return extends


@pytest.fixture(name="logprob_positions")
def logprob_positions_fixture() -> Callable[[Batch], dict[str, range]]:
    return logprob_positions
