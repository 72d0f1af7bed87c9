"""Models over pools that let go of pages: scheduler, prefix tree and runner joined, freed pages full of NaN, logits transformers'."""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.state_pool import StatePoolSpec
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_engine
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch, StepState
from sglang_core.runner.model_runner import ModelRunner
from sglang_core.runner.slot_table import SlotTable
from sglang_core.scheduler import Scheduler, SchedulerConfig
from sglang_core.types import FULL, AddReq, Req, SamplingParams
from tests.models.harness import PAGE_SIZE, build_context, kv_dtype, load
from tests.models.test_parity import BOUND
from tests.models.tiny import VOCAB, hf_model, reference

NUM_NEW = 14
LENGTHS = (58, 29)  # windows are of 5 to 8 tokens
CHUNK = 16
WINDOWED = ("gemma2", "gemma3", "mistral", "qwen2", "phi3", "gpt-oss")
RECURRENT = ("qwen3-next",)


@dataclass
class Recorder:
    """A model that keeps every row of logits it gives."""

    model: CausalLM
    rows: list[Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def __call__(self, fb: ForwardBatch) -> Tensor:
        return self.model(fb)

    def head(self, *args: Tensor | None) -> Tensor:
        self.rows.append(self.model.head(*args))
        return self.rows[-1]


class Engine:
    """What the engine process joins, in one thread, with pools of given sizes."""

    def __init__(self, folder: Path, num_pages: dict[str, int], *, cached: bool = True, max_in_flight: int = 2) -> None:
        backend = CpuBackend()
        runtime = backend.create_runtime(RuntimeContext(devices=tuple(backend.probe())))
        self.model = Recorder(load(folder))
        specs = self.model.model.pool_specs(PAGE_SIZE, kv_dtype(self.model.model))
        kinds = {group: spec.group_spec.kind for group, spec in specs.items()}
        sizes = {group: 1 + num_pages[kind] for group, kind in kinds.items()}
        pools = {
            group: runtime.alloc_state_pool(spec, sizes[group])
            if isinstance(spec, StatePoolSpec)
            else runtime.alloc_pool(spec, sizes[group])
            for group, spec in specs.items()
        }
        for group, pool in pools.items():
            pool.poison(range(sizes[group]))
        state = StepState(pools=pools, next_token_ids=torch.zeros(9, dtype=torch.int32))
        paged = tuple(group for group, kind in kinds.items() if kind != "state")
        table = build_context().table
        self.runner = ModelRunner(
            self.model, table, runtime, state, SlotTable(8, 64, VOCAB, paged), vocab_size=VOCAB, page_size=PAGE_SIZE
        )
        config = SchedulerConfig(
            max_running=8,
            context_length=256,
            page_size=PAGE_SIZE,
            token_budget=CHUNK,
            max_in_flight=max_in_flight,
            groups=tuple(spec.group_spec for spec in specs.values()),
        )
        allocators = {g: PageAllocator(n, functools.partial(self.runner.poison, g)) for g, n in sizes.items()}
        cache = RadixCache(PAGE_SIZE, config.groups) if cached else None
        self.scheduler = Scheduler(config, cache, allocators, iter(range(10**6)).__next__)
        self.peak = dict.fromkeys(sizes, 0)

    def run(self, tokens: dict[str, list[int]], num_new: int = NUM_NEW) -> dict[str, Req]:
        """Generate after each prompt; `logits` then has a row for each position that a step ended at."""
        sampling = SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
        reqs = {rid: Req(rid=rid, input_ids=ids, sampling=sampling) for rid, ids in tokens.items()}
        for req in reqs.values():
            self.scheduler.add_req(req)
        flight: deque = deque()
        self.logits: dict[str, dict[int, Tensor]] = {rid: {} for rid in tokens}
        while self.scheduler.has_work:
            while (batch := self.scheduler.schedule()) is not None:
                flight.append((batch, self.runner.launch(batch.plan)))
            batch, pending = flight.popleft()
            result, rows = pending.result(), self.model.rows.pop(0)
            self.scheduler.process_results(batch, result)
            plan = batch.plan
            for req, start, extend, row in zip(batch.reqs, plan.prefix_lens, plan.extend_lens, rows, strict=True):
                self.logits[req.rid][start + extend - 1] = row
            for group in self.peak:
                _, available, usable = self.scheduler.usage(group)
                self.peak[group] = max(self.peak[group], usable - available)
        return reqs


@functools.cache
def expected(case: str) -> tuple[tuple[list[int], Tensor], ...]:
    """Per prompt: its tokens with transformers' greedy ones, and the logits of them all."""
    model, generator, found = hf_model(case), torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for length in LENGTHS:
            ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            found.append((ids, model(torch.tensor([ids])).logits[0].float()))
    return tuple(found)


def check(engine: Engine, reqs: dict[str, Req], case: str) -> None:
    for rid, req in reqs.items():
        ids, logits = expected(case)[int(rid[0])]
        assert (req.input_ids + req.output_ids)[: len(ids)] == ids
        worst = max(float((row - logits[position]).abs().max()) for position, row in engine.logits[rid].items())
        assert worst < BOUND, (rid, worst)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", WINDOWED + RECURRENT)
def test_long_requests_in_chunks_then_decode(case: str, cached: bool, checkpoints: Path) -> None:
    sizes = {"full": 60, "windowed": 40, "state": 8}
    engine = Engine(reference(case, checkpoints).folder, sizes, cached=cached)
    prompts = {str(i): ids[:-NUM_NEW] for i, (ids, _) in enumerate(expected(case))}
    check(engine, engine.run(prompts), case)
    for group, peak in engine.peak.items():
        spec = engine.runner._state.pools[group].spec.group_spec
        if (
            spec.window is not None
        ):  # two steps in flight share 2 * CHUNK tokens; a window or chunk lies across one page more
            most = len(prompts) * (spec.window // PAGE_SIZE + 2) + 2 * CHUNK // PAGE_SIZE + 2
            assert 0 < peak <= most < sum(len(ids) for ids, _ in expected(case)) // PAGE_SIZE, (group, peak)
        elif spec.kind == "state":
            assert 0 < peak <= len(prompts) * 4
        else:
            assert peak >= (LENGTHS[0] + NUM_NEW) // PAGE_SIZE


@pytest.mark.parametrize("case", WINDOWED + RECURRENT)
def test_a_cached_prefix_is_used_where_its_window_is_still_there(case: str, checkpoints: Path) -> None:
    engine = Engine(reference(case, checkpoints).folder, {"full": 90, "windowed": 40, "state": 24})
    prompts = {str(i): ids[:-NUM_NEW] for i, (ids, _) in enumerate(expected(case))}
    engine.run(prompts)
    again = engine.run({f"{i} again": ids for i, ids in prompts.items()})
    check(engine, again, case)
    assert [req.num_cached_tokens for req in again.values()] == [(n - 1) // PAGE_SIZE * PAGE_SIZE for n in LENGTHS]
    talked_on = engine.run({f"{i} on": ids for i, (ids, _) in enumerate(expected(case))}, num_new=1)
    check(engine, talked_on, case)
    assert [r.num_cached_tokens for r in talked_on.values()] == [
        (n + NUM_NEW - 1) // PAGE_SIZE * PAGE_SIZE for n in LENGTHS
    ]


@pytest.mark.parametrize("case", WINDOWED)
def test_a_pool_with_room_for_one_window_serves_all(case: str, checkpoints: Path) -> None:
    """Quotas let one req in at a time, and chunks are cut to what the pool has room for."""
    engine = Engine(reference(case, checkpoints).folder, {"full": 60, "windowed": 6})
    check(engine, engine.run({str(i): ids[:-NUM_NEW] for i, (ids, _) in enumerate(expected(case))}), case)
    assert FULL not in engine.peak or engine.peak[FULL] <= (LENGTHS[0] + NUM_NEW) // PAGE_SIZE + 1


@pytest.mark.parametrize("case", ["gemma3", "mistral", "qwen3-next", "deepseek-v3", "gpt-oss", "qwen2-moe", "llama3"])
def test_an_engine_on_a_device_that_poisons_freed_pages(case: str, checkpoints: Path) -> None:
    """Built as the command line builds it: pools sized by the fit table, static shapes, steps traced, writes watched."""
    config = EngineConfig.from_flat(
        model_path=str(reference(case, checkpoints).folder),
        device="strict",
        dtype="float32",
        context_length=128,
        page_size=PAGE_SIZE,
        max_running_requests=2,
        chunked_prefill_size=CHUNK,
        max_total_tokens=200,
    )
    core = build_engine(config, world_size=1, directory=None, progress=False)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=NUM_NEW, ignore_eos=True)
    made: dict[str, list[int]] = {}
    for i, (ids, _) in enumerate(expected(case)):
        core.handle(AddReq(rid=str(i), input_ids=ids[:-NUM_NEW], sampling=sampling))
    while core.has_work:
        for out in core.step():
            made.setdefault(out.rid, []).extend(out.token_ids)
    core.runner.close()
    assert made == {str(i): ids[-NUM_NEW:] for i, (ids, _) in enumerate(expected(case))}
    assert {name for name in core.stats() if name.startswith("pool_usage_")} == {
        f"pool_usage_{group}"
        for group in core.runner._state.pools  # type: ignore[attr-defined]
    }
