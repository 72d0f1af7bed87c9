"""The engine level's parts: its models, what it compares by, how it is selected and what the profile `e2e` holds to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang_conformance.case import all_cases
from sglang_conformance.cli import main
from sglang_conformance.e2e.case import EngineCase, level_of_case
from sglang_conformance.e2e.checkpoint import TinyModel, random_weight
from sglang_conformance.e2e.engine import Answer
from sglang_conformance.e2e.env import bodies
from sglang_conformance.e2e.models import MODELS
from sglang_conformance.e2e.relations import check_greedy
from sglang_conformance.isolation import groups
from sglang_conformance.profiles import LEVELS, outcome, problems_of
from sglang_conformance.result import Result, Verdict
from sglang_conformance.tolerance import compare_rows, compare_texts, may_part, row_errors

from sglang_core.models.registry import ARCHITECTURES

F32, BF16 = torch.float32, torch.bfloat16


def test_every_architecture_has_a_model() -> None:
    assert {model.architecture for model in MODELS} == set(ARCHITECTURES)
    assert len({model.name for model in MODELS}) == len(MODELS)


def test_the_fast_tier_has_one_of_each_kind() -> None:
    assert {m.name for m in MODELS if not m.full} == {"llama", "mistral", "mixtral", "deepseek-v3", "demo"}


def test_each_model_has_every_case_and_a_process_of_its_own() -> None:
    cases = [case for case in all_cases() if isinstance(case, EngineCase)]
    names = {case.name for case in cases}
    assert len(names) == 8
    for model in MODELS:
        assert {case.name for case in cases if case.model is model} == names
    work = [(case, case.dtypes[0]) for case in cases]
    assert [{case.model.name for case, _ in group} for group in groups(work)] == [{m.name} for m in MODELS]


@pytest.mark.parametrize("model", [m for m in MODELS if m.name != "demo"], ids=lambda m: m.name)
def test_logits_are_worth_comparing(model: TinyModel) -> None:
    env = bodies(model, F32, 7)
    engine = env.engine()
    (answer,) = engine.answers(env.prompts([20]), 2, scored=True)
    env.close()
    rows = torch.stack([*answer.prompt_rows, *answer.rows])
    assert rows.shape == (21, engine.vocab_size)
    assert float(rows.std(-1).min()) >= 1
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(21))


def test_bodies_are_asked_what_a_device_of_larger_pages_is_asked() -> None:
    model = next(m for m in MODELS if m.name == "llama")
    own, larger = (bodies(model, F32, 7, unit=unit) for unit in (None, 64))
    assert [len(prompt) for prompt in own.prompts()] == [3, 17, 35, 48, 61]
    assert [len(prompt) for prompt in larger.prompts()] == [3, 65, 131, 192, 253]
    (answer,) = larger.engine().answers(larger.prompts()[-1:], 1)
    assert len(answer.tokens) == 1
    for env in (own, larger):
        env.close()


def test_weights_depend_on_their_name_and_the_seed() -> None:
    first = random_weight("a.weight", (4, 8), 0)
    assert torch.equal(first, random_weight("a.weight", (4, 8), 0))
    assert not torch.equal(first, random_weight("b.weight", (4, 8), 0))
    assert not torch.equal(first, random_weight("a.weight", (4, 8), 1))


# Tolerances.


def rows(num: int = 40, width: int = 64) -> torch.Tensor:
    return torch.log_softmax(torch.randn(num, width, generator=torch.Generator().manual_seed(0)) * 2, -1)


def test_a_rows_error_is_a_share_of_its_spread() -> None:
    x = rows()
    off = x + 0.01 * x.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(row_errors(off, x), torch.full((40,), 0.01, dtype=torch.float64), rtol=1e-4, atol=0)


def test_one_bad_row_fails_but_where_experts_are_chosen_in_a_half_type() -> None:
    x, bad = rows(), rows()
    bad[3] = bad[3].flip(0)
    for dtype, routed, fails in ((F32, False, True), (F32, True, True), (BF16, False, True), (BF16, True, False)):
        err, problem = compare_rows("logprobs", bad, x, x, dtype, routed=routed)
        assert (problem is not None, err.ratio > 1) == (fails, fails)
        assert (compare_texts(bad, x, dtype, routed=routed) is not None) is fails
    most = x.flip(-1).where(torch.arange(40)[:, None] < 25, x)
    assert compare_rows("logprobs", most, x, x, BF16, routed=True)[1] is not None


def test_a_device_may_err_twice_as_much_as_the_bodies() -> None:
    x = rows()
    noise = x.std(-1, correction=0, keepdim=True) * 0.1
    assert compare_rows("logprobs", x + 1.9 * noise, x + noise, x, BF16, routed=False)[1] is None
    assert compare_rows("logprobs", x + 2.2 * noise, x + noise, x, BF16, routed=False)[1] is not None


def test_what_is_not_finite_fails() -> None:
    x, bad = rows(), rows()
    bad[0, 0] = float("nan")
    assert compare_rows("logprobs", bad, x, x, BF16, routed=True)[1] is not None
    assert compare_texts(bad, x, BF16, routed=True) == "a row is not finite"


def test_tokens_part_at_ties_only() -> None:
    row = torch.tensor([0.0, -1e-5, -0.05, -3.0, -4.0])
    assert may_part(row, 1, 0, F32, routed=True)
    assert not may_part(row, 2, 0, F32, routed=True)
    assert may_part(row, 2, 0, BF16, routed=False)
    assert not may_part(row, 4, 0, BF16, routed=False)


def test_a_token_that_is_not_the_likeliest_is_no_greedy_one() -> None:
    row = torch.tensor([0.5, 2.0, 1.0])
    check_greedy(Answer(prompt=[1], tokens=[1], rows=[row]))
    with pytest.raises(AssertionError, match="token 2 was taken"):
        check_greedy(Answer(prompt=[1], tokens=[2], rows=[row]))


# The profile and the command line.


def results(verdict: Verdict) -> list[Result]:
    return [
        Result(op=op, title=f"{op}[c-bfloat16]", dtype="bfloat16", profile="core", verdict=verdict)
        for op in LEVELS["e2e"].ops
    ]


def test_the_profile_holds_on_kernels_and_on_bodies() -> None:
    level, cases = LEVELS["e2e"], all_cases()
    for verdict, held in ((Verdict.PASS, "native"), (Verdict.REFERENCE, "reference"), (Verdict.EMULATED, "emulated")):
        assert problems_of(["e2e"], cases, results(verdict)) == []
        assert outcome(level, cases, results(verdict)) == held
    mixed = [replace(r, verdict=Verdict.PASS) if r.op == "e2e.llama" else r for r in results(Verdict.REFERENCE)]
    assert outcome(level, cases, mixed) == "native"


@pytest.mark.parametrize(("verdict", "said"), [(Verdict.FAIL, "fails"), (Verdict.NOT_CLAIMED, "is not claimed")])
def test_the_profile_stated_and_not_kept_is_a_problem(verdict: Verdict, said: str) -> None:
    found = results(Verdict.PASS)
    found[0] = replace(found[0], verdict=verdict)
    (problem,) = problems_of(["e2e"], all_cases(), found)
    assert f"{found[0].op} {said}" in problem


def test_models_of_the_full_tier_are_not_missed_in_the_fast_one() -> None:
    fast = {case.op for case in all_cases() if not case.full}
    found = [r for r in results(Verdict.PASS) if r.op in fast]
    assert 0 < len(found) < len(LEVELS["e2e"].ops)
    assert problems_of(["e2e"], all_cases(), found) == []
    assert len(problems_of(["e2e"], all_cases(), found[1:])) == 1


def test_a_level_is_selected_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cpu", "--level", "e2e", "-k", "norm.rms"]) == 2
    assert "no case of level e2e's title contains 'norm.rms'" in capsys.readouterr().err
    assert main(["run", "cpu", "--level", "ops", "-k", "e2e."]) == 2
    assert {level_of_case(case) for case in all_cases()} == {"ops", "e2e"}
    assert main(["run", "cpu", "--level", "e2e", "-k", "e2e.llama[logits-float32", "--num-threads", "1"]) == 0
