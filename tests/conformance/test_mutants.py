"""The suite kills every kernel with a mistake in it, and lets honest ones live."""

from __future__ import annotations

import pytest
import torch
from sglang_conformance.runner import Result, Suite, Verdict, Work, untested_claims

from sglang_core.backend.claims import Claim, Claims
from sglang_core.backend.interface import DeviceInfo, KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.torch_backend import TorchBackend
from tests.conformance.mutants import GALLERY, bodies

PROFILES = ("window", "soft_cap", "sinks", "tree", "cross", "kv_half", "kv_fp8", "kv_int8", "odd_sizes", "buckets")
ATTENTION = "tests.conformance.mutants.attention"
USERS = {"attn.plan": "attn.paged", "ssm.plan": "ssm.gated_delta_rule"}
INFO = DeviceInfo(backend="mutant", path="mutant", name="one mistake")


class MutantBackend(TorchBackend):
    name = "mutant"

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def probe(self) -> list[DeviceInfo]:
        return [INFO]

    def claims(self, ctx: KernelContext) -> Claims:
        return self._claims


def kernel(op: str, function: str, **facts: object) -> Kernel:
    return Kernel(op, provider="mutant", fn=function, device=("mutant",), **facts)  # type: ignore[arg-type]


def suite(*kernels: Kernel, claims: Claims | None = None, full: bool = False) -> Suite:
    claims = claims or Claims.native([k.op for k in kernels], dtypes=("float32", "bfloat16"), profiles=PROFILES)
    return Suite(MutantBackend(claims), INFO, num_threads=1, kernels=kernels, full=full)


def honest(op: str) -> str:
    return f"{bodies.__name__}:body_of_{op.replace('.', '_')}"


def cases_of(op: str, part: str) -> list[Work]:
    """The cases that must kill a mutant. A plan is tried through the op that it is made for."""
    cases = [
        (case, dtype) for case, dtype in suite(full=bool(part)).select([f"{USERS.get(op, op)}["]) if part in case.name
    ]
    assert cases, f"no case of {op} is named {part!r}"
    # Last float16, where a square overflows, and formats of weights: the others see nearly all.
    return sorted(cases, key=lambda item: (item[1] is torch.float16, item[0].fmt not in ("*", "dense")))


@pytest.mark.parametrize("target", GALLERY, ids=lambda target: target.rpartition(":")[2])
def test_a_mistake_fails(target: str, kill_table: list[tuple[str, str, str]]) -> None:
    mutant, name = GALLERY[target], target.rpartition(":")[2]
    user = [kernel(USERS[mutant.op], honest(USERS[mutant.op]))] if mutant.op in USERS else []  # of the same provider
    mine = suite(kernel(mutant.op, target, features=mutant.features), *user)
    results = (mine.judge(case, dtype) for case, dtype in cases_of(mutant.op, mutant.cases))
    killer = next((r for r in results if r.verdict is Verdict.FAIL), None)
    assert killer is not None, f"{name} lives"
    assert "Error:" not in killer.reason, f"{name} fails by raising: {killer.reason}"
    assert "refuses" not in killer.reason, f"{name} does not run: {killer.reason}"
    kill_table.append((name, killer.title, killer.reason))


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [t for t, m in GALLERY.items() if m.cases and m.alone], ids=lambda target: target.rpartition(":")[2]
)
def test_nothing_else_sees_a_mistake_that_has_its_case(target: str) -> None:
    """So no case that the gallery names could be left out."""
    mutant = GALLERY[target]
    mine = suite(kernel(mutant.op, target, features=mutant.features))
    others = [(case, dtype) for case, dtype in mine.select([f"{mutant.op}["]) if mutant.cases not in case.name]
    found = [r.title for r in (mine.judge(*work) for work in others) if r.verdict is Verdict.FAIL]
    assert not found


def test_honest_attention_passes() -> None:
    mine = suite(kernel("attn.paged", f"{ATTENTION}:naive_paged"))
    work = [(case, dtype) for case, dtype in mine.select(["attn.paged["]) if dtype is not torch.float16]
    results = [mine.judge(case, dtype) for case, dtype in work]
    wrong = [(r.title, r.reason) for r in results if r.verdict is Verdict.FAIL]
    assert not wrong
    assert {r.provider for r in results} == {"mutant"}


def verdicts(results: list[Result], dtype: str = "float32") -> set[Verdict]:
    return {r.verdict for r in results if r.dtype == dtype}


def test_what_nothing_claims_is_reference() -> None:
    results = list(suite(claims=Claims()).run(["logits.mask["]))
    assert verdicts(results) == {Verdict.REFERENCE}


def test_an_unclaimed_kernel_that_works_is_reported() -> None:
    results = list(
        suite(kernel("attn.merge", f"{bodies.__name__}:body_of_merge"), claims=Claims()).run(["attn.merge["])
    )
    assert verdicts(results) == {Verdict.NOT_CLAIMED}


def test_an_unclaimed_kernel_that_is_wrong_fails() -> None:
    wrong = suite(kernel("attn.merge", f"{ATTENTION}:merge_in_base_2"), claims=Claims())
    results = list(wrong.run(["attn.merge[halves"]))
    assert verdicts(results) == {Verdict.FAIL}


def test_a_claim_without_a_kernel_fails() -> None:
    results = list(suite(claims=Claims.native(["norm.layer"], profiles=PROFILES)).run(["norm.layer["]))
    assert verdicts(results) == {Verdict.FAIL}
    assert "claims it natively" in results[0].reason


def test_a_refusal_fails_in_core_and_in_profiles_that_are_stated_only() -> None:
    def no_windows(ctx: object) -> str | None:
        return "no windows" if ctx.site.spec.window else None  # type: ignore[attr-defined]

    honest = kernel("attn.paged", f"{ATTENTION}:naive_paged", supports=no_windows)
    for profiles, expected in (((), Verdict.NOT_CLAIMED), (("window",), Verdict.FAIL)):
        claims = Claims.native(["attn.paged"], profiles=profiles)
        results = list(suite(honest, claims=claims).run(["attn.paged[window 16"]))
        assert verdicts(results) == {expected}

    def nothing(ctx: object) -> str:
        return "not today"

    refuses = kernel("attn.paged", f"{ATTENTION}:naive_paged", supports=nothing)
    assert verdicts(list(suite(refuses).run(["attn.paged[decode"]))) == {Verdict.FAIL}


def test_unsupported_is_not_run() -> None:
    from sglang_core.backend.claims import Support

    claims = Claims((Claim(op="norm.layer", dtypes=("float32",), support=Support.UNSUPPORTED),))
    assert verdicts(list(suite(claims=claims).run(["norm.layer["]))) == {Verdict.NOT_CLAIMED}


def test_a_kernel_that_raises_fails_with_its_words() -> None:
    results = list(suite(kernel("norm.layer", "tests.conformance.mutants.rows:gates_with_up")).run(["norm.layer[bias"]))
    assert verdicts(results) == {Verdict.FAIL}
    assert "TypeError" in results[0].reason


def test_claims_without_a_case_are_listed() -> None:
    assert untested_claims(Claims.native(["attn.paged", "attn.plan", "norm.layer"])) == []
    assert untested_claims(Claims((Claim(op="*"),))) == []
    assert untested_claims(Claims.native(["acme.untested"])) == ["acme.untested"]
