"""The engine level kills backends whose ops may each be right, and whose engine is not; and engines that lose pages and slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import Suite

from sglang_core.backend.claims import Claim, Claims, Support
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.scheduler.scheduler import Scheduler
from tests.conformance import engine_mutants
from tests.conformance.engine_mutants import INFO, EngineMutant, OutOfOrder, Replays

HERE, OPS_MUTANTS = "tests.conformance.engine_mutants", "tests.conformance.mutants"
# What is wrong -> the op and its kernel, or the runtime; the case that must see it.
MUTANTS: dict[str, tuple[Any, str]] = {
    "rotates_the_other_style": (("rope.apply", f"{OPS_MUTANTS}.rows"), "e2e.llama[logits"),
    "one_scale_for_the_batch": (("gemm.linear", HERE), "e2e.llama[batched"),
    "forgets_the_newest_key_in_decode": (("attn.plan", HERE), "e2e.llama[decode as prefill"),
    "forgets_the_prefix_in_chunks": (("attn.paged", HERE), "e2e.llama[chunked prefill"),
    "prefix_is_one_page_short": (("attn.plan", HERE), "e2e.llama[prefix hit"),
    "forgets_the_last_of_a_batch": (("attn.plan", HERE), "e2e.llama[batched"),
    "page_ids_in_three_bits": (("attn.plan", HERE), "e2e.llama[batched"),
    "keeps_pages": (("attn.paged", HERE), "e2e.llama[retracted"),
    "runs_the_newest_first": (OutOfOrder, "e2e.llama[overlap off"),
    "replays_what_it_captured": (Replays, "e2e.llama[decode as prefill"),
    "keeps_its_inputs": (("act.gated", HERE), "e2e.llama[200 requests"),
    "delta_writes_where_it_read": (("ssm.gated_delta_rule", f"{OPS_MUTANTS}.ssm"), "e2e.qwen3-next[prefix hit"),
}
PARTNERS = {"attn.plan": ("attn.paged", "attend")}  # a plan is chosen with the op that it is made for


def kernel(op: str, function: str, module: str = HERE, **facts: Any) -> Kernel:
    return Kernel(op, provider="mutant", fn=f"{module}:{function}", device=("mutant",), **facts)


def suite(*kernels: Kernel, runtime: type[TorchRuntime] = TorchRuntime, claims: Claims | None = None) -> Suite:
    return Suite(EngineMutant(kernels, runtime, claims), INFO, num_threads=1)


def mutant(name: str) -> Suite:
    what, _ = MUTANTS[name]
    if not isinstance(what, tuple):
        return suite(runtime=what)
    op, module = what
    partners = [kernel(*PARTNERS[op])] if op in PARTNERS else []
    return suite(kernel(op, name, module), *partners)


def judged(mine: Suite, case: str, dtype: torch.dtype = torch.float32) -> Result:
    (work,) = [(c, d) for c, d in mine.select([case]) if d is dtype or len(c.dtypes) == 1]
    try:
        return mine.judge(*work)
    finally:
        mine.close()
        engine_mutants.KEPT.clear()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fails(name: str, kill_table: list[tuple[str, str, str]]) -> None:
    found = judged(mutant(name), MUTANTS[name][1])
    assert found.verdict is Verdict.FAIL, f"{name} lives"
    assert "Error:" not in found.reason, f"{name} fails by raising: {found.reason}"
    kill_table.append((name, found.title, found.reason))


@pytest.mark.parametrize(
    "name", ["forgets_the_prefix_in_chunks", "prefix_is_one_page_short", "forgets_the_last_of_a_batch"]
)
def test_a_prefill_alone_would_not_show_it(name: str) -> None:
    """So that the cases above are needed: each of these gives the reference's log-probabilities of whole prompts."""
    assert judged(mutant(name), "e2e.llama[logits").verdict is Verdict.PASS


CASES = (
    "logits",
    "decode as prefill",
    "prefix hit",
    "chunked prefill",
    "batched",
    "retracted",
    "overlap off",
    "200 requests",
)


def test_an_honest_kernel_passes() -> None:
    mine = suite(kernel("attn.paged", "attend"))
    results = [mine.judge(c, d) for c, d in mine.select(["e2e.llama["]) if d is torch.float32 or len(c.dtypes) == 1]
    mine.close()
    assert [(r.title, r.verdict, r.reason) for r in results if r.verdict is not Verdict.PASS] == []
    assert {r.title.partition("[")[2].rpartition("-")[0] for r in results} == set(CASES)
    assert {(r.provider, r.kernels) for r in results} == {("mutant", (f"{HERE}:attend",))}


def test_a_page_that_does_not_come_back_fails(
    monkeypatch: pytest.MonkeyPatch, kill_table: list[tuple[str, str, str]]
) -> None:
    free, lost = PageAllocator.free, list[int]()

    def loses_one(self: PageAllocator, pages: list[int]) -> None:
        if len(pages) > 1 and not lost:
            lost.append(pages[0])
            pages = pages[1:]
        free(self, pages)

    monkeypatch.setattr(PageAllocator, "free", loses_one)
    found = judged(suite(), "e2e.llama[200 requests")
    assert found.verdict is Verdict.FAIL
    assert "free pages" in found.reason
    kill_table.append(("(core) loses a page", found.title, found.reason))


def test_a_slot_that_does_not_come_back_fails(
    monkeypatch: pytest.MonkeyPatch, kill_table: list[tuple[str, str, str]]
) -> None:
    abort, lost = Scheduler.abort, list[int]()

    def loses_a_slot(self: Scheduler, rid: str) -> Any:
        outputs = abort(self, rid)
        if self._free_slots and not lost:
            lost.append(self._free_slots.pop())
        return outputs

    monkeypatch.setattr(Scheduler, "abort", loses_a_slot)
    found = judged(suite(), "e2e.llama[200 requests")
    assert found.verdict is Verdict.FAIL
    assert "slots are lost" in found.reason
    kill_table.append(("(core) loses a slot", found.title, found.reason))


def test_bodies_alone_are_reference_and_an_emulated_device_never_passes() -> None:
    assert judged(suite(), "e2e.llama[overlap off").verdict is Verdict.REFERENCE
    emulated = Suite(EngineMutant([kernel("attn.paged", "attend")]), replace(INFO, facts={"emulated": True}))
    assert judged(emulated, "e2e.llama[overlap off").verdict is Verdict.EMULATED


def test_what_is_declared_unsupported_is_not_run() -> None:
    claims = Claims((Claim(op="attn.mla_paged", support=Support.UNSUPPORTED),))
    found = judged(suite(claims=claims), "e2e.deepseek-v3[logits")
    assert (found.verdict, found.reason) == (Verdict.NOT_CLAIMED, "declared unsupported; not run")


def test_a_refusal_fails_once_the_option_is_stated() -> None:
    def no_windows(ctx: Any) -> str | None:
        return "no windows" if ctx.site.spec.window else None

    honest = kernel("attn.paged", "attend", supports=no_windows)
    for profiles, expected in (((), Verdict.NOT_CLAIMED), (("window",), Verdict.FAIL)):
        claims = Claims.native(["attn.paged"], profiles=profiles)
        found = judged(suite(honest, claims=claims), "e2e.mistral[logits")
        assert found.verdict is expected
        assert "no windows" in found.reason
