"""Many different requests at once in a pool with room for two or three: the greedy ones get a quiet engine's tokens, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

import pytest

from sglang_core import Engine
from sglang_core.engine.requests import GenerateRequest
from sglang_core.types import LogprobParams, SamplingParams

WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "Berlin",
    "Monday",
    "red",
    "3",
    "+",
    "4",
    "=",
    "7",
    "hello",
    "中文",
    "🙂",
]
NUM_REQUESTS, AT_ONCE, POOL, PAGE_SIZE = 40, 16, 126, 7


@dataclass(frozen=True)
class Asked:
    request: GenerateRequest
    leaves: str  # how the caller leaves before the end: "", "close", "abort"

    @property
    def is_exact(self) -> bool:
        return self.request.sampling.is_greedy and not self.leaves


def draw(rnd: random.Random, number: int) -> Asked:
    text = " ".join(rnd.choices(WORDS, k=rnd.randint(1, 20)))
    sampling = SamplingParams(
        max_new_tokens=rnd.choice([0, 1, 20, 60, 60]),
        temperature=rnd.choice([0.0, 0.0, 0.0, 1.5]),
        top_k=rnd.choice([-1, 5]),
        frequency_penalty=rnd.choice([0.0, 0.0, 1.0]),
        stop=rnd.choice([(), (), ("a", "Paris"), ("🙂",)]),
        ignore_eos=rnd.random() < 0.7,
        n=rnd.choice([1, 1, 1, 3]),
        seed=number,
    )
    logprob = rnd.choice([None, None, LogprobParams(logprob_start_len=rnd.choice([-1, 0, 3, 99]), top_logprobs_num=2)])
    request = GenerateRequest(
        text=("The capital of France is Paris. " if rnd.random() < 0.4 else "") + text,
        sampling=sampling,
        logprob=logprob,
        rid=f"soak-{number}",
        priority=rnd.randint(-2, 2),
        salt=rnd.choice(["", "", "other"]),
        stream=rnd.random() < 0.6,
    )
    return Asked(request, rnd.choice(["", "", "", "close", "abort"]))


async def answers(engine: Engine, asked: Asked) -> dict[int, tuple[list[int], str, int]]:
    """index -> tokens, text, and the number of input logprobs."""
    out: dict[int, tuple[list[int], str, int]] = {}
    chunks = engine.client.generate(asked.request)
    async for chunk in chunks:
        ids, text, scored = out.get(chunk.index, ([], "", 0))
        out[chunk.index] = ids + chunk.token_ids, text + chunk.text, scored + len(chunk.input_logprobs)
        if asked.leaves == "close":
            await chunks.aclose()  # type: ignore[attr-defined]
        elif asked.leaves == "abort":
            await engine.client.abort(asked.request.rid or "")
    return out


def drained(engine: Engine) -> dict[str, float]:
    """Stats, once the step is done that was in flight when the last req was aborted."""
    for _ in range(100):
        stats = engine.stats()
        if not stats["in_flight"]:
            break
        time.sleep(0.05)
    return stats


@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_a_crowd_gets_what_one_gets_and_leaves_nothing(engine: Engine, disable_overlap_schedule: bool) -> None:
    rnd = random.Random(5)
    crowd = [draw(rnd, number) for number in range(NUM_REQUESTS)]

    async def run(engine: Engine, at_once: int) -> list[dict[int, tuple[list[int], str, int]]]:
        room = asyncio.Semaphore(at_once)

        async def one(asked: Asked) -> dict[int, tuple[list[int], str, int]]:
            async with room:
                return await answers(engine, asked)

        return await asyncio.gather(*(one(asked) for asked in crowd))

    with Engine(
        model_path="demo",
        device="cpu",
        dtype="float32",
        in_process=True,
        context_length=128,
        chunked_prefill_size=24,
        page_size=PAGE_SIZE,
        max_total_tokens=POOL,
        disable_overlap_schedule=disable_overlap_schedule,
    ) as small:
        got = small._wait(run(small, AT_ONCE))
        client, stats = small.client, drained(small)
        assert stats["running"] == stats["waiting"] == stats["in_flight"] == 0
        assert stats["retractions"] > 0, "the pool was too large to tell"
        assert not client._answers and not client._groups and not client._controls
        assert small.flush_cache() and small.stats()["free_pages"] == POOL // PAGE_SIZE
    want = engine._wait(run(engine, 1))
    exact = [number for number, asked in enumerate(crowd) if asked.is_exact]
    assert len(exact) > NUM_REQUESTS // 4
    assert [got[number] for number in exact] == [want[number] for number in exact]
