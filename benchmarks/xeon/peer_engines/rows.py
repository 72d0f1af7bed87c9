"""Runs a workload on its engines, in turn within each round, checks what they answer, and makes the row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peer_engines.child import Child, ChildError
from peer_engines.engines import OURS, OWN_VARIANTS
from peer_engines.workloads import Workload
from sglang_core.bench.workload import Prompt

ANSWER = 900.0  # seconds that an answer may take
JUDGED, JUDGED_TOKENS, SLACK = 2, 8, 0.25
WARM_SEED = 10**6


@dataclass(kw_only=True, slots=True)
class Row:
    """Tokens/s by engine, round by round. `failed` says why an engine has none."""

    shape: str
    workload: str
    unit: str
    target: float
    rates: dict[str, list[float]] = field(default_factory=dict)
    regrets: dict[str, float] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, engine: str) -> float | None:
        return statistics.median(rates) if (rates := self.rates.get(engine)) else None

    @property
    def best_peer(self) -> str | None:
        peers = [engine for engine in self.rates if engine not in (OURS, *OWN_VARIANTS) and self.rates[engine]]
        return max(peers, key=lambda peer: self.median(peer) or 0.0, default=None)

    @property
    def ratio(self) -> float | None:
        """The median over rounds of ours to the best peer's, both of the same round."""
        if (peer := self.best_peer) is None or not self.rates.get(OURS):
            return None
        return statistics.median(a / b for a, b in zip(self.rates[OURS], self.rates[peer], strict=False))

    def facts(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "workload": self.workload,
            "unit": self.unit,
            "medians": {engine: self.median(engine) for engine in self.rates},
            "rounds": self.rates,
            "best_peer": self.best_peer,
            "ratio": self.ratio,
            "target": self.target,
            "worst_regret": self.regrets,
            "cached_tokens": self.cached,
            "failed": self.failed,
        }


def run(shape: str, workload: Workload, children: Mapping[str, Child], judge: Child | None, rounds: int) -> Row:
    """Who answers nonsense, or not at all, is out of the row, with the reason in it."""
    row = Row(shape=shape, workload=workload.name, unit=workload.unit, target=workload.target)
    able = [engine for engine in workload.engines if engine in children]
    for engine in list(able):
        try:
            row.regrets[engine] = _warm_up(workload, children[engine], judge)
            row.rates[engine] = []
        except ChildError as error:
            row.failed[engine] = str(error)
            able.remove(engine)
    for i in range(rounds):
        for engine in able[i % len(able) :] + able[: i % len(able)] if able else ():
            try:
                rate, cached = _measure(workload, children[engine], seed=2 * i)
            except ChildError as error:
                row.failed[engine] = str(error)
                able = [other for other in able if other != engine]
                continue
            row.rates[engine].append(rate)
            row.cached[engine] = cached
    return row


def _warm_up(workload: Workload, child: Child, judge: Child | None) -> float:
    """A run that is not counted, with its answers judged: how far the worst token judged is from the best logit."""
    prompts = workload.prompts(WARM_SEED)
    answer = _ask(child, prompts, [min(p.output_len, JUDGED_TOKENS + 1) for p in prompts])
    if judge is None:
        return 0.0
    worst = 0.0
    for place in range(0, len(prompts), max(1, len(prompts) // JUDGED)):
        ids, tokens = prompts[place].input_ids or [], answer["tokens"][place]
        scored = judge.ask({"score": [ids + tokens], "num_prompt_tokens": len(ids)}, ANSWER)
        worst = max(worst, *scored["regrets"])
    if worst > SLACK and child.name not in OWN_VARIANTS:  # fewer bits are other weights than the judge's
        raise ChildError(
            f"answers tokens whose logit is {worst:.2f} below the best; a right engine stays under {SLACK}"
        )
    return worst


def _measure(workload: Workload, child: Child, *, seed: int) -> tuple[float, int]:
    """-> (tokens/s, prompt tokens from cache)."""
    prompts = workload.prompts(seed)
    answer = _ask(child, prompts, [p.output_len for p in prompts])
    output_tokens = sum(p.output_len for p in prompts)
    if workload.counts_prompt:
        return sum(len(p.input_ids or ()) for p in prompts) / answer["seconds"], answer["cached"]
    if not workload.decode:
        return output_tokens / answer["seconds"], answer["cached"]
    first = workload.prompts(seed + 1)
    once = _ask(child, first, [1] * len(first))
    return (output_tokens - len(prompts)) / (answer["seconds"] - once["seconds"]), answer["cached"]


def _ask(child: Child, prompts: list[Prompt], lengths: list[int]) -> dict[str, Any]:
    time.sleep(0.3)  # threads of the engine before, which spin for a while, are asleep
    return child.ask({"ids": [p.input_ids for p in prompts], "lengths": lengths}, ANSWER)
