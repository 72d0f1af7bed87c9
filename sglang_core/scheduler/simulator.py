"""Drives the very Scheduler with a fake device, a fake clock and a seed: arrivals, aborts, stops and tiny pools at random.

python -m sglang_core.scheduler.simulator --seeds 2000 [--first 0]

A seed draws a configuration, with the pool groups of some model, and a load. Whatever it draws, each req's tokens must equal those of a straight sequential run, every
step must read only its own KV, and pages, pins, slots and endings must add up after each event.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_core.cache.radix import RadixCache, RadixNode
from sglang_core.errors import RequestError
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.fake_device import FakeDevice, History, WatchedAllocator
from sglang_core.scheduler.policy import POLICIES
from sglang_core.scheduler.quota import SMALLEST_CHUNK
from sglang_core.scheduler.scheduler import Scheduler
from sglang_core.scheduler.state_slots import num_state_slots
from sglang_core.types import (
    CROSS,
    FULL_GROUP,
    STATE,
    Batch,
    FinishReason,
    ForwardMode,
    GroupSpec,
    LogprobParams,
    PoolGroup,
    Req,
    ReqOutput,
    ReqStatus,
    SamplingParams,
    TokenLogprobs,
    window_group,
)

VOCAB_SIZE = 40  # small, so that stop ids turn up
EOS = 0
NAMESPACES: tuple[tuple[str, ...], ...] = ((), ("tenant",), ("tenant", "adapter@1"))
ADAPTERS = ("", "a@1", "b@1", "c@1", "c@2")
CACHE_ID_SHIFT = 1000  # image-like prompts: what the tree is keyed by differs from what the model reads


@dataclass(eq=False, slots=True)
class Client:
    """A req, what it ought to get, and what it got."""

    req: Req
    history: History
    expected: list[int]
    reason: FinishReason
    stop_after: int | None = None  # the detokenizer finds a stop string once so many tokens are out
    abort_at: int | None = None  # tick
    release_at: int = 0  # tick at which its holds end
    got: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: FinishReason | None = None
    aborted: bool = False


ENCODER_LENS = (0, 1, 7, 20)
WINDOWS = (1, 2, 5, 8, 17, 40)


def draw_groups(rng: random.Random) -> tuple[GroupSpec, ...]:
    """Those of a dense model, of one with windows in some or all layers, of one with recurrent layers, or all at once."""
    windows = [GroupSpec(name=window_group(w), kind="windowed", window=w) for w in rng.sample(WINDOWS, 2)]
    state = GroupSpec(name=STATE, kind="state")
    return rng.choice(
        (
            (FULL_GROUP,),
            (FULL_GROUP, *windows[:1]),
            (*windows[:1], FULL_GROUP),
            (FULL_GROUP, *windows),
            tuple(windows[:1]),
            tuple(windows),
            (FULL_GROUP, state),
            (*windows[:1], state),
            (FULL_GROUP, GroupSpec(name=CROSS, kind="cross")),
            (state, FULL_GROUP, *windows),
        )
    )


def draw_config(rng: random.Random, groups: tuple[GroupSpec, ...]) -> SchedulerConfig:
    recurrent = any(group.kind == "state" for group in groups)
    max_in_flight = rng.choice((1, 2, 2, 3))
    return SchedulerConfig(
        max_running=rng.randint(1, 8),
        context_length=rng.randint(20, 150),
        page_size=rng.choice((1, 1, 2, 3, 4, 8, 16)),
        token_budget=rng.choice((2, 5, 16, 33, 64, 500)),
        chunked=rng.random() < 0.8,
        max_queued=rng.choice((None, None, 6)),
        policy=rng.choice(list(POLICIES)),
        max_in_flight=max_in_flight,
        random_seed=rng.randrange(100),
        tokens_per_step=rng.choice((1, 3)) if max_in_flight == 1 and not recurrent else 1,
        fair_every=rng.choice((1, 2, 5, 16)),
        output_reserve=rng.choice((0.0, 0.0, 0.1, 0.7)),
        prefix_wait_tokens=rng.choice((1, 8, 32, 10_000)),
        num_adapter_slots=rng.choice((0, 1, 1, 2, 3)),
        groups=groups,
    )


def draw_sizes(rng: random.Random, config: SchedulerConfig, *, cached: bool) -> dict[PoolGroup, int]:
    """Pages of each group, scratch included: sometimes just enough for one req."""
    main = 1 + max(4, int(rng.choice((0.4, 1.0, 1.0, 1.5, 3, 8)) * config.context_length) // config.page_size)
    sizes = {}
    for group in config.groups:
        sizes[group.name] = main
        if group.window is not None:
            least = max(SMALLEST_CHUNK, config.tokens_per_step) * config.max_in_flight + group.window
            sizes[group.name] = 1 + max(4, int(rng.choice((1, 1, 1.3, 2, 5)) * (3 + least / config.page_size)))
        elif group.kind == "state":
            one = num_state_slots(config.max_in_flight, cached=cached) + cached
            sizes[group.name] = 1 + int(rng.choice((1, 1.5, 3, 10)) * one)
        elif group.kind == "cross":
            sizes[group.name] = 1 + rng.choice((1, 2, 5, 20)) * (-(-max(ENCODER_LENS) // config.page_size))
    return sizes


class Simulation:
    """One seed. `run` raises AssertionError where an invariant breaks; `counts` says what came to pass."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.config = config = draw_config(rng, draw_groups(random.Random(~seed)))
        cached = rng.random() < 0.85
        self.sizes = draw_sizes(rng, config, cached=cached)
        self.device = FakeDevice(
            config.groups, self.sizes, config.page_size, config.max_running, VOCAB_SIZE, config.tokens_per_step
        )
        self.cache = RadixCache(config.page_size, config.tree_groups) if cached else None
        self.allocators = {group: WatchedAllocator(n, self.device, group) for group, n in self.sizes.items()}
        self.now = 0.0
        self.tick = 0
        self.scheduler = Scheduler(config, self.cache, self.allocators, lambda: self.now)
        self.trunks = [[rng.randrange(1, VOCAB_SIZE) for _ in range(config.context_length)] for _ in range(3)]
        self.use_cache_ids = rng.random() < 0.2
        self.clients: dict[str, Client] = {}
        self.to_come = rng.randint(4, 24)
        self.flight: deque[Batch] = deque()
        self.counts: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()  # starts while a req was the oldest that could

    def run(self) -> Counter[str]:
        work = 0
        while self.to_come or self.scheduler.has_work:
            self._arrive()
            self._interfere()
            self._plan()
            self._process()
            self._check()
            self.tick += 1
            self.now += self.rng.choice((0.0, 0.01, 1.0))
            work = max(work, 500 + 60 * sum(len(c.history.token_ids) for c in self.clients.values()))
            assert self.tick < work, "no end in sight"
        self._check_ends()
        self.counts["retractions"] += int(self.scheduler.stats()["retractions"])
        self.counts["cached_tokens"] += int(self.scheduler.stats()["cached_tokens"])
        return self.counts

    def _arrive(self) -> None:
        while self.to_come and self.rng.random() < 0.4:
            self.to_come -= 1
            client = self._draw_client(f"r{self.to_come}")
            rid = client.req.rid
            try:
                self.scheduler.add_req(client.req)
            except RequestError as error:
                self._check_refusal(client.req, error)
            else:
                self.clients[rid] = client

    def _check_refusal(self, req: Req, error: RequestError) -> None:
        too_long = len(req.input_ids) >= min(self.config.context_length, self._pool_tokens() + 1)
        if error.param == "logprob_start_len":
            assert self.config.recurrent and self.config.chunked
        else:
            assert error.code == ("context_length_exceeded" if too_long else "queue_full")
        self.counts["refused"] += 1

    def _draw_client(self, rid: str) -> Client:
        rng, config = self.rng, self.config
        shared = rng.choice(self.trunks)[: rng.randint(0, config.context_length * 2 // 3)]
        prompt = shared + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(0 if shared else 1, 12))]
        sampling = SamplingParams(
            max_new_tokens=rng.choice((0, 1, 5, 20, 60, 60, 1000)),
            min_new_tokens=rng.choice((0, 0, 10)),
            stop_token_ids=rng.choice(((), (), (7, 8))),
            ignore_eos=rng.random() < 0.3,
        )
        namespace = rng.choice(NAMESPACES) if rng.random() < 0.3 else ()
        adapter = rng.choice(ADAPTERS) if config.num_adapter_slots else ""
        held = rng.random() < 0.1
        req = Req(
            rid=rid,
            input_ids=prompt,
            cache_ids=[t + CACHE_ID_SHIFT for t in prompt] if self.use_cache_ids else None,
            sampling=sampling,
            namespace=(*namespace, adapter),
            adapter=adapter,
            encoder_len=(encoder_len := self._draw_encoder_len()),
            encoder_key=f"{rng.randrange(3)} of {encoder_len}" if encoder_len else "",
            priority=rng.randint(-2, 2),
            eos_ids=frozenset({EOS}),
            logprob=LogprobParams(logprob_start_len=rng.randint(-1, len(prompt))) if rng.random() < 0.2 else None,
            holds={"grammar"} if held else set(),
        )
        salt = NAMESPACES.index(namespace) * len(ADAPTERS) + ADAPTERS.index(adapter)
        history = History.of(salt, prompt, config.context_length, VOCAB_SIZE)
        room = min(sampling.max_new_tokens, config.context_length - len(prompt), self._pool_tokens() + 1 - len(prompt))
        expected, reason = sequential_run(history.token_ids[len(prompt) :], sampling, room)
        return Client(
            req,
            history,
            expected,
            reason,
            stop_after=rng.randint(0, 20) if rng.random() < 0.15 else None,
            abort_at=self.tick + rng.randint(0, 60) if rng.random() < 0.15 else None,
            release_at=self.tick + rng.randint(0, 40) if held else 0,
        )

    def _draw_encoder_len(self) -> int:
        return self.rng.choice(ENCODER_LENS) if CROSS in self.sizes else 0

    def _pool_tokens(self) -> int:
        """Of groups that hold a whole prompt at once."""
        kept = {"full"} if self.config.chunked else {"full", "windowed"}
        pages = [self.sizes[group.name] - 1 for group in self.config.groups if group.kind in kept]
        return min(pages, default=10**6) * self.config.page_size - (self.config.tokens_per_step - 1)

    def _interfere(self) -> None:
        for client in self.clients.values():
            rid = client.req.rid
            if client.release_at == self.tick:
                self.scheduler.release_hold(rid, "grammar")
            if client.abort_at == self.tick:
                client.aborted = client.aborted or client.end is None
                self._deliver(self.scheduler.abort(rid))
            found = client.stop_after is not None and len(client.got) >= max(1, client.stop_after)
            if found and self.rng.random() < 0.5:  # sometimes late, and again after the req has ended
                self._deliver(self.scheduler.finish_at(rid, client.stop_after or 0, "STOP"))
        if self.rng.random() < 0.001:
            for client in self.clients.values():
                client.aborted = client.aborted or client.end is None
            self._deliver(self.scheduler.abort(""))
        if self.rng.random() < 0.02:
            running = self.scheduler.num_running
            assert self.scheduler.flush_cache() == (running == 0)
            assert running or all(a.num_free == a.num_usable for a in self.allocators.values())

    def _plan(self) -> None:
        while self.rng.random() < 0.9:
            waiting = [c.req for c in self.clients.values() if c.req.status is ReqStatus.WAITING and not c.req.holds]
            batch = self.scheduler.schedule()
            if batch is None:
                full = len(self.flight) == self.config.max_in_flight
                stuck = not self.flight and (waiting or self.scheduler.num_running)
                assert full or not stuck, "reqs could run, nothing is in flight, and nothing is planned"
                return
            self._check_plan(batch, waiting)
            self.device.submit(batch, [self.clients[req.rid].history for req in batch.reqs])
            self.flight.append(batch)
            assert len(self.flight) <= self.config.max_in_flight

    def _process(self) -> None:
        if self.flight and self.rng.random() < 0.8:
            result = self.device.run_next()
            self._deliver(self.scheduler.process_results(self.flight.popleft(), result))

    def _deliver(self, outputs: Sequence[ReqOutput]) -> None:
        for out in outputs:
            client = self.clients[out.rid]
            assert client.end is None, f"{out.rid} got news after its end"
            client.got += out.token_ids
            client.logprobs += out.input_logprobs
            client.end = out.finish_reason
            assert client.got == client.expected[: len(client.got)], f"{out.rid} differs from the sequential run"

    def _check_plan(self, batch: Batch, waiting: list[Req]) -> None:
        plan, config = batch.plan, self.config
        assert len(set(plan.slots)) == len(plan.slots) and all(0 <= slot < config.max_running for slot in plan.slots)
        started = self._started(batch)
        assert not config.chunked or sum(plan.extend_lens) <= config.token_budget
        if plan.mode == ForwardMode.DECODE.value:
            ends = [req.reserved_len + config.tokens_per_step - 1 for req in batch.reqs]
            for pages in [{g: len(pages) for g, pages in req.pages.items()} for req in batch.reqs]:
                assert len(set(pages.values())) == 1, "while reqs decode, groups list equally many columns"
            rows = zip(batch.reqs, ends, strict=True)
            assert all(end <= len(next(iter(req.pages.values()))) * config.page_size for req, end in rows)
        for req, start in zip(batch.reqs, plan.prefix_lens, strict=True):
            assert start >= req.cached_len, "a step writes into a page of the tree"
        self.counts[plan.mode] += 1
        self.counts["adapter_writes"] += len(plan.adapter_writes)
        self.counts["device_ids"] += plan.token_ids.count(-1)
        self.counts["resent"] += sum(
            start < old
            for start, old in zip(next(iter(plan.page_starts.values())), plan.prefix_lens)
            if start and config.page_size == 1
        )
        self._check_fairness(started, waiting)

    def _started(self, batch: Batch) -> set[str]:
        slots = {init.slot for init in batch.plan.inits}
        return {req.rid for req in batch.reqs if req.slot in slots}

    def _check_fairness(self, started: set[str], waiting: list[Req]) -> None:
        """Nobody is passed more often than fair_every, plus what one step starts at once, unless it waits for a prefix."""
        if not waiting or self.config.prefix_wait_tokens <= self.config.context_length:
            return
        oldest = min(waiting, key=lambda req: req.arrival)
        if oldest.rid not in started and sum(req.arrival == oldest.arrival for req in waiting) == 1:
            self.passed[oldest.rid] += len(started)
            assert self.passed[oldest.rid] <= 2 * (self.config.fair_every + self.config.max_running), "starvation"

    def _check(self) -> None:
        """Page conservation and pins, from the reqs, the tree and the allocator alone."""
        running = [c.req for c in self.clients.values() if c.req.status is ReqStatus.RUNNING]
        assert len({req.slot for req in running}) == len(running) == self.scheduler.num_running
        idle = [c.req for c in self.clients.values() if c.req.status is not ReqStatus.RUNNING]
        assert not any(req.pages or req.node or req.num_in_flight for req in idle)
        pins: Counter[RadixNode] = Counter()
        nodes = list(self.cache.nodes()) if self.cache else []
        for req in running:
            pins.update(path_to(req.node))
            assert req.cached_len <= req.committed_len <= req.reserved_len
        for node in nodes:
            assert node.lock_ref == pins[node]
        for group in self.config.groups:
            if group.kind == "cross":
                self._check_encoders(group.name, running)
            elif group.kind == "state":
                self._check_states(group.name, running, nodes)
            elif group.window is None:
                self._check_full(group.name, running, nodes)
            else:
                self._check_windowed(group.name, group.window, running, nodes)
        for name in self.sizes:
            free, available, usable = self.scheduler.usage(name)
            assert 0 <= free <= available <= usable == self.sizes[name] - 1

    def _check_full(self, group: PoolGroup, running: list[Req], nodes: list[RadixNode]) -> None:
        size = self.config.page_size
        for req in running:
            assert req.reserved_len <= len(req.pages[group]) * size
            held = [page for node in path_to(req.node) for page in node.pages[group]]
            assert req.pages[group][: req.cached_len // size] == held
        self._check_owners(
            group, [page for req in running for page in req.pages[group][req.cached_len // size :]], nodes
        )
        if self.cache is not None:
            assert self.cache.num_pages == sum(len(node.pages[group]) for node in nodes)
            assert self.cache.num_evictable == sum(len(node.pages[group]) for node in nodes if not node.lock_ref)

    def _check_windowed(self, group: PoolGroup, window: int, running: list[Req], nodes: list[RadixNode]) -> None:
        """A req holds what its window sees and what it is about to write, within its quota, and nothing else."""
        size, owned, pins = self.config.page_size, [], Counter[int]()
        for req in running:
            pages, own = req.pages[group], req.cached_len // size
            end = req.committed_len // size * size if self.cache else req.committed_len
            first = max(0, end - window) // size
            mine, tail = [page for page in pages[own:] if page], req.held_tail.get(group, [])
            needed = max(0, req.committed_len - window + 1) // size
            assert all(pages[needed : -(-req.committed_len // size)]) and not any(pages[:first]), (
                "what is held is the window"
            )
            cached = [page for node in path_to(req.node) for page in node.pages[group]]
            assert tail == [p for p in pages[:own] if p] == [p for p, kept in zip(cached, pages) if kept]
            assert len(mine) + len(tail) <= req.quota[group], "a req holds more than its quota"
            assert len(mine) + len(tail) <= (req.reserved_len - req.committed_len + window + 2 * size) // size + 2
            owned += mine
            pins.update(tail)
        assert sum(req.quota[group] for req in running) <= self.sizes[group] - 1
        self.counts["windows_moved"] += sum(0 in req.pages[group] for req in running)
        self.counts["tombstones"] += sum(0 in node.pages[group] for node in nodes)
        self._check_owners(group, owned, nodes, pins)

    def _check_encoders(self, group: PoolGroup, running: list[Req]) -> None:
        """Outputs in use are whole, shared by content only, and the rest of the pool is free or can be."""
        size, used = self.config.page_size, dict[str, list[int]]()
        for req in running:
            assert len(req.encoder_pages) == -(-req.encoder_len // size)
            assert used.setdefault(req.encoder_key, req.encoder_pages) is req.encoder_pages or not req.encoder_len
        pages = [page for held in used.values() for page in held]
        _, available, usable = self.scheduler.usage(group)
        assert len(set(pages)) == len(pages) == usable - available
        self.counts["encoder_outputs_shared"] += sum(bool(r.encoder_len) for r in running) - sum(
            map(bool, used.values())
        )

    def _check_states(self, group: PoolGroup, running: list[Req], nodes: list[RadixNode]) -> None:
        pins = Counter(slot for req in running for slot in req.held_tail.get(group, []))
        owned = [slot for req in running for slot in req.states.owned]
        assert all(len(node.pages[group]) == 1 for node in nodes)
        assert sum(req.quota[group] for req in running) <= self.sizes[group] - 1
        self.counts["snapshots"] += len([node for node in nodes if node.pages[group] != [0]])
        self._check_owners(group, owned, nodes, pins)

    def _check_owners(
        self, group: PoolGroup, owned: list[int], nodes: list[RadixNode], pins: Counter[int] | None = None
    ) -> None:
        """Every page has one owner: a req, the tree or the allocator. Of loose groups `pins` says who holds which."""
        cached = [page for node in nodes for page in node.pages[group] if page]
        assert len(set(owned + cached)) == len(owned) + len(cached), f"a page of {group} has two owners"
        assert len(owned) + len(cached) + self.allocators[group].num_free == self.sizes[group] - 1, (
            f"{group}: a page is lost"
        )
        if self.cache is not None and pins is not None:
            loose = self.cache.loose[group]
            assert loose.num_pages == len(cached) and set(pins) <= set(cached)
            assert loose.num_evictable == len(set(cached) - set(pins))

    def _check_ends(self) -> None:
        for client in self.clients.values():
            end, req = client.end, client.req
            assert end is not None and end == req.finish_reason, "a req did not end"
            self.counts[f"ended by {'stop string' if end.matched == 'STOP' else end.type}"] += 1
            if end.type == "abort":
                assert client.aborted
            elif end.matched == "STOP":
                assert client.stop_after is not None and req.output_ids == client.expected[: client.stop_after]
            else:
                assert client.got == client.expected == req.output_ids and end == client.reason
                self._check_logprobs(client)
        assert self.scheduler.flush_cache() and all(a.num_free == a.num_usable for a in self.allocators.values())
        assert self.cache is None or not list(self.cache.nodes()), "flushing leaves nothing behind"

    def _check_logprobs(self, client: Client) -> None:
        req, links = client.req, client.history.links
        start = req.logprob.logprob_start_len if req.logprob else -1
        wanted = range(start, len(req.input_ids)) if start >= 0 else ()
        self.counts["input_logprobs"] += len(wanted)
        assert client.logprobs == [
            TokenLogprobs(req.input_ids[p], None if p == 0 else float(links[p - 1] % 1000)) for p in wanted
        ]


def sequential_run(tokens: list[int], sampling: SamplingParams, room: int) -> tuple[list[int], FinishReason]:
    """The output of a req that runs alone, and why it ends."""
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    for count, token in enumerate(tokens[:room], 1):
        if token in stops and count > sampling.min_new_tokens:
            return tokens[:count], FinishReason("stop", matched=token)
    return tokens[:room], FinishReason("length")


def path_to(node: RadixNode | None) -> list[RadixNode]:
    """The nodes that a pin on `node` pins, in position order."""
    path = []
    while node is not None and node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="check the scheduler's invariants under random loads")
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    args = parser.parse_args()
    totals: Counter[str] = Counter()
    for seed in range(args.first, args.first + args.seeds):
        try:
            totals += Simulation(seed).run()
        except Exception as error:
            raise SystemExit(f"seed {seed}: {type(error).__name__}: {error}") from error
    print(f"{args.seeds} seeds hold; " + ", ".join(f"{name} {count}" for name, count in sorted(totals.items())))


if __name__ == "__main__":
    main()
