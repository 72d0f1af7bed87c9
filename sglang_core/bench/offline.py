"""`bench offline`: a workload straight into an engine, all requests at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_core.bench.workload import Prompt

if TYPE_CHECKING:
    from sglang_core import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRun:
    """One pass over the workload."""

    seconds: float
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.seconds

    @property
    def output_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds


def run_offline(
    engine: Engine, prompts: Sequence[Prompt], clock: Callable[[], float] = time.perf_counter
) -> OfflineRun:
    """Ask everything at once and wait for all of it. Greedy, to the full length."""
    sampling = [{"temperature": 0, "max_new_tokens": p.output_len, "ignore_eos": True} for p in prompts]
    asked: dict[str, Any] = (
        {"input_ids": [p.input_ids for p in prompts]}
        if all(p.input_ids is not None for p in prompts)
        else {"prompt": [p.as_words() for p in prompts]}
    )
    started = clock()
    answers = engine.generate(**asked, sampling_params=sampling)
    seconds = clock() - started
    meta = [answer["meta_info"] for answer in answers]
    return OfflineRun(
        seconds=seconds,
        num_requests=len(answers),
        prompt_tokens=sum(m["prompt_tokens"] for m in meta),
        cached_tokens=sum(m["cached_tokens"] for m in meta),
        output_tokens=sum(m["completion_tokens"] for m in meta),
    )


def median_run(runs: Sequence[OfflineRun]) -> OfflineRun:
    """The run whose time is the (lower) median."""
    middle = statistics.median_low(run.seconds for run in runs)
    return next(run for run in runs if run.seconds == middle)
