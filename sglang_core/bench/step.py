"""`bench step` and `profile`: single steps of a model, straight into the runner, with no scheduler around them."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sglang_core.errors import ConfigError
from sglang_core.types import FULL_GROUP, ForwardMode, GroupSpec, PoolGroup, SamplingParams, SlotInit, StepPlan

if TYPE_CHECKING:
    from sglang_core.backend.selection import Instrument
    from sglang_core.config import EngineConfig
    from sglang_core.engine.build import Rank

FIRST_PAGE = 1  # page 0 is scratch
LEAST_CHUNK = 2  # tokens that the scheduler wants room for in a step


class Pending(Protocol):
    def result(self) -> object: ...


class Runner(Protocol):
    """What executes plans: a rank's `ModelRunner`."""

    def launch(self, plan: StepPlan) -> Pending: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """R reqs that extend by `extend_len` tokens each, after `prefix_len` that are in the KV pool already."""

    num_reqs: int
    prefix_len: int
    extend_len: int

    @classmethod
    def prefill(cls, num_reqs: int, length: int) -> StepShape:
        return cls(num_reqs=num_reqs, prefix_len=0, extend_len=length)

    @classmethod
    def decode(cls, num_reqs: int, length: int) -> StepShape:
        """The step that brings reqs of `length - 1` tokens to `length`."""
        return cls(num_reqs=num_reqs, prefix_len=length - 1, extend_len=1)

    @property
    def mode(self) -> ForwardMode:
        return ForwardMode.DECODE if self.extend_len == 1 else ForwardMode.PREFILL

    @property
    def num_tokens(self) -> int:
        return self.num_reqs * self.extend_len

    @property
    def length(self) -> int:
        return self.prefix_len + self.extend_len

    def pages_per_req(self, page_size: int) -> int:
        return -(-self.length // page_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one shape's steps, launch to tokens on the host."""

    shape: StepShape
    median: float
    best: float
    repeats: int

    @property
    def tokens_per_s(self) -> float:
        return self.shape.num_tokens / self.median


class StepDriver:
    """Makes and runs plans of given shapes on a runner, greedy, every req with pages of its own."""

    def __init__(
        self,
        runner: Runner,
        *,
        page_size: int,
        num_pages: Mapping[PoolGroup, int],
        groups: Sequence[GroupSpec] = (FULL_GROUP,),
        vocab_size: int,
        max_running: int,
        context_length: int,
    ) -> None:
        self._runner, self._page_size, self._vocab_size = runner, page_size, vocab_size
        self._num_pages, self._max_running, self._context_length = num_pages, max_running, context_length
        self._paged = {group.name: group.window for group in groups if group.kind != "state"}
        self._recurrent = any(group.kind == "state" for group in groups)
        self._steps = itertools.count()
        self._rng = random.Random(0)

    @classmethod
    def of(cls, rank: Rank) -> StepDriver:
        settled = rank.resolved.config
        assert settled.cache.page_size is not None and settled.schedule.max_running_requests is not None
        return cls(
            rank.runner,
            page_size=settled.cache.page_size,
            num_pages=rank.num_pages,
            groups=[pool.spec.group_spec for pool in rank.state.pools.values()],
            vocab_size=rank.resolved.model.vocab_size,
            max_running=settled.schedule.max_running_requests,
            context_length=rank.resolved.context_length,
        )

    def plan(self, shape: StepShape) -> StepPlan:
        """Raises ConfigError where the context, the batch or the pool is too small for the shape."""
        if shape.length > self._context_length:
            raise ConfigError(
                f"requests of {shape.length} tokens are over the context of {self._context_length}; lower --length"
            )
        if shape.num_reqs > self._max_running:
            raise ConfigError(
                f"{shape.num_reqs} requests are over --max-running-requests {self._max_running}; raise it"
            )
        num_reqs = shape.num_reqs
        return StepPlan(
            step=next(self._steps),
            mode=shape.mode.value,
            slots=list(range(num_reqs)),
            prefix_lens=[shape.prefix_len] * num_reqs,
            extend_lens=[shape.extend_len] * num_reqs,
            token_ids=self._rng.choices(range(self._vocab_size), k=shape.num_tokens),
            sample=[True] * num_reqs,
            page_starts={group: [0] * num_reqs for group in self._paged},
            new_pages={group: self._tables(shape, group) for group in self._paged},
            state_reads=[0] * num_reqs if self._recurrent else [],  # what states hold costs the same
            state_writes=list(range(FIRST_PAGE, FIRST_PAGE + num_reqs)) if self._recurrent else [],
            inits=[
                SlotInit(slot=slot, sampling=SamplingParams(temperature=0.0), seed=slot, num_prompt_tokens=1)
                for slot in range(num_reqs)
            ],
        )

    def _tables(self, shape: StepShape, group: PoolGroup) -> list[list[int]]:
        """Each req's pages, none shared; of a windowed group only those that the step reads or writes."""
        window = self._paged[group]
        gone = 0 if window is None else max(0, shape.prefix_len - window) // self._page_size
        pages = shape.pages_per_req(self._page_size) - gone
        if pages * shape.num_reqs > self._num_pages[group] - FIRST_PAGE:
            needed = pages * shape.num_reqs * self._page_size
            raise ConfigError(
                f"{shape} needs a KV pool {group!r} of {needed} tokens; raise --max-total-tokens, or take smaller steps"
            )
        return [[0] * gone + [FIRST_PAGE + r * pages + i for i in range(pages)] for r in range(shape.num_reqs)]

    def run(self, shape: StepShape, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of one step."""
        plan = self.plan(shape)
        started = clock()
        self._runner.launch(plan).result()
        return clock() - started

    def measure(self, shape: StepShape, repeats: int, clock: Callable[[], float] = time.perf_counter) -> StepTime:
        """The median of `repeats` steps, after one that is not counted."""
        self.run(shape)
        seconds = [self.run(shape, clock) for _ in range(repeats)]
        return StepTime(shape=shape, median=statistics.median(seconds), best=min(seconds), repeats=repeats)


def open_rank(config: EngineConfig, shapes: Sequence[StepShape], instrument: Instrument | None = None) -> Rank:
    """A rank with a pool that is just large enough for `shapes` and holds numbers, not pages that were never touched."""
    if config.parallel.tp_size > 1:
        raise ConfigError(f"--tp-size {config.parallel.tp_size}: single steps are measured on one rank; drop it")
    from sglang_core.engine.build import build_rank  # imports torch

    config = fitted(config, shapes)
    rank = build_rank(config, 0, world_size=1, directory=None, progress=False, instrument=instrument)
    fill_pools(rank)
    return rank


def fitted(config: EngineConfig, shapes: Sequence[StepShape]) -> EngineConfig:
    """The config with a pool and a batch as large as the shapes need, where it leaves them open."""
    from sglang_core.config import EngineConfig

    settings = config.flat()
    page_size = settings["page_size"] or 64  # a page more than needed is no loss
    needed = max(shape.num_reqs * (shape.pages_per_req(page_size) + 1) * page_size for shape in shapes)
    settings["max_total_tokens"] = settings["max_total_tokens"] or needed
    settings["max_running_requests"] = settings["max_running_requests"] or max(shape.num_reqs for shape in shapes)
    settings["chunked_prefill_size"] = settings["chunked_prefill_size"] or max(
        LEAST_CHUNK, *(shape.num_tokens for shape in shapes)
    )
    return EngineConfig.from_flat(**settings)


def fill_pools(rank: Rank) -> None:
    """Write every page: memory that was never touched is all one page to the host, and reads too fast."""
    for pool in rank.state.pools.values():
        for leaf in pool.leaves:
            leaf.copy_(leaf[:1].float().normal_().to(leaf.dtype).expand_as(leaf))
