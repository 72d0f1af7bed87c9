"""A crash or a hang fails the case it happens in, and the others of its group still get their verdicts."""

from __future__ import annotations

import pytest
from sglang_conformance.isolation import groups, run_isolated
from sglang_conformance.result import Verdict

from tests.conformance.fake_device import layer_norm, suite


@pytest.mark.parametrize(
    ("function", "limit", "said"),
    [("crashes_on_bias", 300.0, "killed by SIGKILL"), ("hangs_on_bias", 8.0, "did not end within 8 s")],
)
def test_the_rest_of_the_group_is_judged(function: str, limit: float, said: str) -> None:
    mine = suite(layer_norm(function))
    texts = ["norm.layer[bias-float32", "norm.layer[no bias"]
    results = {r.title: r for r in run_isolated(mine, mine.select(texts), limit=limit)}
    assert results.keys() == {case.title(dtype) for case, dtype in mine.select(texts)}
    dead = results.pop("norm.layer[bias-float32]")
    assert dead.verdict is Verdict.FAIL
    assert said in dead.reason
    assert results["norm.layer[no bias-float32]"].verdict is Verdict.PASS
    assert all(r.verdict is not Verdict.FAIL for r in results.values())


def test_several_groups_at_a_time_give_what_one_process_gives() -> None:
    mine = suite(layer_norm("honest"))
    texts = ["norm.layer[", "logits.mask[", "norm.rms[no rows"]
    work = mine.select(texts)
    assert len(groups(work)) == 3
    apart = {r.title: r for r in run_isolated(mine, work, jobs=2)}
    together = {r.title: r for r in mine.run(texts)}
    assert apart.keys() == together.keys()
    for title, result in together.items():
        assert (apart[title].verdict, apart[title].errors) == (result.verdict, result.errors)
