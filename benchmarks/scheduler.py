"""Host time of the scheduler: a decode step at full batch, admission from a deep queue, and the prefix tree on its own.

python benchmarks/scheduler.py        prints one line a figure: the median and the spread over several runs
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.scheduler import Scheduler, SchedulerConfig
from sglang_core.scheduler.policy import LongestPrefixMatch
from sglang_core.types import FULL, Batch, Req, SamplingParams, StepResult

PAGE_SIZE = 16
RUNS = 7


def new_scheduler(*, num_reqs: int, max_in_flight: int = 2, policy: str = "lpm", num_pages: int = 100_000) -> Scheduler:
    config = SchedulerConfig(
        max_running=num_reqs,
        context_length=32_768,
        page_size=PAGE_SIZE,
        token_budget=65_536,
        max_in_flight=max_in_flight,
        policy=policy,
    )
    return Scheduler(config, RadixCache(PAGE_SIZE), {FULL: PageAllocator(num_pages)}, time.monotonic)


def result_of(batch: Batch) -> StepResult:
    """What a device would answer: the same token everywhere, which stops nobody."""
    sample = batch.plan.sample
    return StepResult(
        step=batch.plan.step, token_ids=[[7] if s else [] for s in sample], num_accepted=[int(s) for s in sample]
    )


def add_reqs(scheduler: Scheduler, count: int, *, prompt: int, max_new_tokens: int = 4096, seed: int = 0) -> None:
    rng = random.Random(seed)
    for i in range(count):
        ids = [rng.randrange(100_000) for _ in range(prompt)]
        sampling = SamplingParams(max_new_tokens=max_new_tokens)
        scheduler.add_req(Req(rid=f"{seed}-{i}", input_ids=ids, sampling=sampling, eos_ids=frozenset({2})))


def decode_step(num_reqs: int, max_in_flight: int, steps: int = 200) -> float:
    """Seconds of schedule() and process_results() together, per step, with every req decoding."""
    scheduler = new_scheduler(num_reqs=num_reqs, max_in_flight=max_in_flight)
    add_reqs(scheduler, num_reqs, prompt=64)
    flight: list[Batch] = []
    spent: list[float] = []
    while len(spent) < steps:
        start = time.perf_counter()
        batch = scheduler.schedule()
        planned = time.perf_counter() - start
        if batch is not None:
            flight.append(batch)
        if len(flight) == max_in_flight:
            oldest = flight.pop(0)
            result = result_of(oldest)
            start = time.perf_counter()
            scheduler.process_results(oldest, result)
            if oldest.plan.mode == "decode" and len(oldest.reqs) == num_reqs:
                spent.append(planned + time.perf_counter() - start)
    return statistics.median(spent)


def blocked_queue(policy: str, num_waiting: int = 1000) -> float:
    """Seconds of schedule() where a slot is free, 1,000 reqs wait, and the first of them does not fit."""
    scheduler = new_scheduler(num_reqs=9, max_in_flight=1, policy=policy, num_pages=1 + 8 * 30)
    add_reqs(scheduler, 8, prompt=256, max_new_tokens=200)
    scheduler.process_results(batch := scheduler.schedule(), result_of(batch))
    add_reqs(scheduler, num_waiting, prompt=2000, seed=1)
    spent = []
    for _ in range(50):
        start = time.perf_counter()
        batch = scheduler.schedule()
        spent.append(time.perf_counter() - start)
        scheduler.process_results(batch, result_of(batch))
    return statistics.median(spent)


def order_after_a_change(shared: int = 1000, num_waiting: int = 1000) -> float:
    """Seconds of one lpm ordering when the tree has just changed, so that its window is looked up again."""
    cache, rng = RadixCache(PAGE_SIZE), random.Random(0)
    prefix = [rng.randrange(100_000) for _ in range(shared)]
    pages = shared // PAGE_SIZE
    cache.insert((), prefix[: pages * PAGE_SIZE], {FULL: list(range(1, 1 + pages))})
    waiting = [
        Req(rid=str(i), input_ids=prefix + [rng.randrange(100_000) for _ in range(1000)], sampling=SamplingParams())
        for i in range(num_waiting)
    ]
    policy, spent = LongestPrefixMatch(cache), []
    for i in range(30):
        cache.insert((str(i),), [1] * PAGE_SIZE, {FULL: [1_000_000 + i]})
        start = time.perf_counter()
        next(policy.order(waiting))
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def tree_of(num_tokens: int, run: int = 2000) -> tuple[RadixCache, list[list[int]], random.Random]:
    """A tree of prompts, of which each shares a random part with an earlier one."""
    rng, cache, next_page = random.Random(0), RadixCache(PAGE_SIZE), 1
    prompts: list[list[int]] = [[rng.randrange(100_000) for _ in range(run)]]
    while cache.num_pages * PAGE_SIZE < num_tokens:
        shared = rng.randrange(0, run)
        ids = rng.choice(prompts)[:shared] + [rng.randrange(100_000) for _ in range(run - shared)]
        cache.insert((), ids, {FULL: list(range(next_page, next_page + run // PAGE_SIZE))})
        next_page += run // PAGE_SIZE
        prompts.append(ids)
    return cache, prompts, rng


def match_and_insert(num_tokens: int = 1_000_000, tries: int = 300) -> float:
    """Seconds to match a prompt of 2,000 tokens, half of it cached, and to insert the other half."""
    cache, prompts, rng = tree_of(num_tokens)
    spent = []
    for i in range(tries):
        ids = rng.choice(prompts)[:1000] + [rng.randrange(100_000) for _ in range(1000)]
        pages = {FULL: list(range(10_000_000 + i * 200, 10_000_000 + i * 200 + 125))}
        start = time.perf_counter()
        match = cache.match((), ids)
        cache.lock(match.node)
        rest = {FULL: pages[FULL][match.num_tokens // PAGE_SIZE :]}
        cache.insert((), ids[match.num_tokens :], rest, below=match.node)
        spent.append(time.perf_counter() - start)
        cache.unlock(match.node)
    return statistics.median(spent)


def evict_a_page(num_tokens: int = 1_000_000, pages: int = 20_000) -> float:
    """Seconds to evict one page, one call a page."""
    cache, _, _ = tree_of(num_tokens)
    start = time.perf_counter()
    for _ in range(pages):
        cache.evict(1)
    return (time.perf_counter() - start) / pages


def report(name: str, measure: Callable[[], float]) -> None:
    times = sorted(measure() * 1e6 for _ in range(RUNS))
    print(f"{name:<62} {statistics.median(times):9.1f} us   ({times[0]:.1f} - {times[-1]:.1f})")


if __name__ == "__main__":
    for num_reqs in (32, 256):
        for depth in (1, 2):
            name = f"decode step, {num_reqs} reqs, {depth} in flight: schedule + process"
            report(name, lambda n=num_reqs, d=depth: decode_step(n, d))
    for policy in ("fcfs", "lpm", "dfs-weight", "priority"):
        report(f"schedule() with 1,000 waiting, none fits: {policy}", lambda p=policy: blocked_queue(p))
    report("lpm order of 1,000 waiting after the tree changed", order_after_a_change)
    report("radix match + insert, 2,000 tokens, half cached, tree of 1M", match_and_insert)
    report("radix evict, one page a call, tree of 1M tokens", evict_a_page)
