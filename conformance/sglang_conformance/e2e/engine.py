"""`Engine`: one engine of a device, driven step by step in this thread, so that which req meets which is the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sglang_conformance.case import dtype_name
from sglang_conformance.e2e.checkpoint import TinyModel
from sglang_core.backend.devices import ChosenDevice
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_engine
from sglang_core.engine.explain import explain
from sglang_core.engine.resolve import resolve
from sglang_core.types import AbortReq, AddReq, LogprobParams, ReqOutput, SamplingParams, TokenLogprobs

Kind = Literal["whole", "small", "no overlap"]
MAX_RUNNING, FEW = 8, 4
SMALLEST_UNIT = 16


@dataclass(kw_only=True)
class Answer:
    """What a req gave. Rows are log-probabilities over the vocabulary: of each token of the answer, and of the prompt but its first."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # float32[V] each
    prompt_rows: list[Tensor] = field(default_factory=list)
    num_cached: int = 0


class Engine:
    """`unit` is what lengths are chosen by: a page, or 16 tokens where pages are smaller, if it is not given."""

    def __init__(
        self,
        model: TinyModel,
        device: ChosenDevice,
        kind: Kind,
        *,
        dtype: torch.dtype,
        weights: torch.dtype,
        seed: int,
        num_threads: int | None = None,
        unit: int | None = None,
    ) -> None:
        """`weights` is the dtype that the checkpoint is rounded to, `dtype` what the engine computes in."""
        self.broken = False
        with model.checkpoint(weights, seed) as folder:
            given = {"model_path": str(folder), "dtype": dtype_name(dtype), "num_threads": num_threads}
            page_size = resolve(EngineConfig.from_flat(**given), device).config.cache.page_size
            assert page_size is not None, "resolve() settles it"
            self.unit = unit or max(page_size, SMALLEST_UNIT)
            config = EngineConfig.from_flat(**given, **settings(kind, self.unit))
            self.explained = explain(config, device)
            self._core = build_engine(config, world_size=1, directory=None, progress=False, device=device)
        self.vocab_size = int(str(self._core.info["vocab_size"]))
        self._num_added = 0

    def answers(
        self, prompts: Sequence[list[int]], num_new: int, *, every: int | None = None, scored: bool = False
    ) -> list[Answer]:
        """Greedy answers of `num_new` tokens. `every`: a req comes each so many steps; None: once the one before has ended.

        `scored`: with rows of the prompt, for which none of it is taken from the cache.
        """
        found: dict[str, Answer] = {}
        waiting, step = list(prompts), 0
        while waiting or self.has_work:
            while waiting and (not self.has_work if every is None else step >= every * len(found)):
                rid = self.add(waiting[0], num_new, scored=scored)
                found[rid] = Answer(prompt=waiting.pop(0))
            for out in self.step():
                self._take(found[out.rid], out)
            step += 1
        return list(found.values())

    def add(self, prompt: list[int], num_new: int, *, scored: bool | None = None) -> str:
        """Queue a req and give its rid. `scored` None: without rows."""
        self._num_added += 1
        rid = str(self._num_added)
        logprob = None
        if scored is not None:
            logprob = LogprobParams(top_logprobs_num=self.vocab_size, logprob_start_len=0 if scored else -1)
        sampling = SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
        refused = self._core.handle(AddReq(rid=rid, input_ids=list(prompt), sampling=sampling, logprob=logprob))
        assert refused == [], f"a req is refused: {refused}"
        return rid

    def abort(self, rid: str) -> None:
        self._core.handle(AbortReq(rid=rid))

    def step(self) -> list[ReqOutput]:
        """Launch a step, and what has come of those before."""
        try:
            return self._core.step()
        except BaseException:
            self.broken = True  # the state of its device is unknown
            raise

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def stats(self) -> dict[str, float]:
        return self._core.stats()

    def flush(self) -> None:
        """Forget every cached prefix."""
        assert self._core.scheduler.flush_cache(), "a req that has ended pins pages"

    @property
    def retracts(self) -> bool:
        """Whether reqs can run out of pages: windows and states are bounded, granted before a req starts, and so keep it waiting."""
        kinds = {group.kind for group in self._core.scheduler.config.groups}
        return "full" in kinds and "state" not in kinds

    def free_pages(self) -> dict[str, tuple[int, int]]:
        """Of each pool group: pages that are free, and in all."""
        usage = {g.name: self._core.scheduler.usage(g.name) for g in self._core.scheduler.config.groups}
        return {name: (free, usable) for name, (free, _, usable) in usage.items()}

    def close(self) -> None:
        self._core.runner.close()

    def _take(self, answer: Answer, out: ReqOutput) -> None:
        reason = out.finish_reason
        assert reason is None or reason.type == "length", f"a req ends with {reason}"
        answer.tokens += out.token_ids
        answer.num_cached = max(answer.num_cached, out.num_cached_tokens)
        answer.rows += [self._row(entry) for entry in out.logprobs]
        answer.prompt_rows += [self._row(entry) for entry in out.input_logprobs if entry.logprob is not None]

    def _row(self, entry: TokenLogprobs) -> Tensor:
        assert len(entry.top_ids) == self.vocab_size, f"{len(entry.top_ids)} log-probabilities of {self.vocab_size}"
        return torch.empty(self.vocab_size).index_copy_(
            0, torch.tensor(entry.top_ids), torch.tensor(entry.top_logprobs)
        )


def settings(kind: Kind, unit: int) -> dict[str, Any]:
    """whole: all prompts in one step, and room for all. small: in chunks that end within pages, and room for two reqs or three."""
    if kind == "small":
        room = {"chunked_prefill_size": unit + unit // 2 + 1, "max_total_tokens": 8 * unit, "max_running_requests": FEW}
    else:
        room = {"chunked_prefill_size": 12 * unit, "max_total_tokens": 64 * unit, "max_running_requests": MAX_RUNNING}
    return room | {"context_length": 8 * unit, "disable_overlap_schedule": kind == "no overlap"}
