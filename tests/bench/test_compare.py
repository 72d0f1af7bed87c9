"""`tune --providers`: who is dropped, who is recommended, and what is timed beside what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sglang_core.backend.kernel import Kernel
from sglang_core.bench.compare import Outcome, Score, compare
from sglang_core.bench.comparison import Comparison, plan_comparison
from sglang_core.config import EngineConfig
from sglang_core.errors import DeviceError
from tests.bench.fake_providers import BODY, OP, acme, install, kernel

BASE = kernel("base", 90)


def planned(*overrides: str, op: str = OP, names: Sequence[str] = ()) -> Comparison:
    config = EngineConfig.from_flat(model_path="demo", device="cpu", dtype="float32", kernel=overrides)
    return plan_comparison(config, op, names, context=20)


def compared(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel, tokens: Sequence[int] = (1,), **took: float) -> Outcome:
    install(monkeypatch, *kernels).took.update(took)
    return compare(planned(), tokens, repeats=3)


def score(outcome: Outcome, name: str) -> Score:
    return next(score for score in outcome.scores if score.provider == name)


def test_the_faster_one_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = compared(monkeypatch, BASE, kernel("other", 10), base=10, other=5, reference=20)
    assert [s.provider for s in outcome.scores] == ["other", BODY]
    assert outcome.base == [0.01]
    assert outcome.best is not None and outcome.best.provider == "other"
    assert outcome.best.ratio == pytest.approx(0.5)
    assert score(outcome, BODY).ratio == pytest.approx(2)


@pytest.mark.parametrize(("other", "better"), [(9.9, False), (10.0, False), (30.0, False), (9.7, True)])
def test_two_percent_are_asked_for(monkeypatch: pytest.MonkeyPatch, other: float, better: bool) -> None:
    outcome = compared(monkeypatch, BASE, kernel("other", 10), base=10, other=other)
    assert (outcome.best is not None) == better


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wrong", "wrong result ("), ("idle", "wrong result ("), ("raises", "raised MemoryError: out of shared memory (")],
)
def test_what_is_wrong_or_raises_is_out(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    """However fast, and named with the call."""
    outcome = compared(monkeypatch, BASE, kernel(name, 10), tokens=(1, 2), base=10, **{name: 1.0})
    assert score(outcome, name).dropped.startswith(reason)
    assert "1 tokens" in score(outcome, name).dropped
    assert outcome.best is None
    assert len(outcome.titles) == 2, "the others go on"


def test_all_shapes_decide_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as fast on one and thrice as slow on the other is no gain."""
    clock = install(monkeypatch, BASE, kernel("other", 10))
    clock.took["other"] = lambda count: 5 if count <= 3 else 30
    outcome = compare(planned(), (1, 4), repeats=3)
    assert score(outcome, "other").pairs == {0: (0.005, 0.01), 1: (0.03, 0.01)}
    assert outcome.best is None


def test_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, BASE, kernel("other", 10))
    clock.took |= {"base": 10, "other": 12, BODY: 31}
    compare(planned(), (1,), repeats=8)
    assert [(name, repeats) for name, repeats, _ in clock.timed] == [
        *[("base", 3), ("other", 3), ("base", 3), ("other", 3), ("base", 2), ("other", 2)],
        *[("base", 3), (BODY, 3)],  # hopeless
    ]


@pytest.mark.parametrize("safe", [True, False])
def test_both_are_replayed_or_none(monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    clock = install(monkeypatch, kernel("base", 90, safe=True), kernel("other", 10, safe=safe))
    compare(planned(names=["other"]), (1,), repeats=1)
    assert clock.timed == [("base", 1, safe), ("other", 1, safe)]


def test_the_one_in_force_is_timed_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, BASE)
    outcome = compare(planned(names=["base"]), (1,), repeats=4)
    assert outcome.base == [0.01]
    assert clock.timed == [("base", 4, False)]


def test_one_in_force_that_is_wrong_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"the provider \(wrong\) in force .* is wrong itself"):
        compared(monkeypatch, kernel("wrong", 90))
    with pytest.raises(DeviceError, match=r"MemoryError: out of shared memory; put another in force .*other"):
        compared(monkeypatch, kernel("raises", 90), kernel("other", 10))


def test_who_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not who comes next."""
    with pytest.raises(DeviceError, match="breaks broke the device .* --providers other,reference"):
        compared(monkeypatch, BASE, kernel("breaks", 50), kernel("other", 10))


def test_attention_is_compared_as_the_group_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel comes with its own plan, within the whole that the layer calls."""
    clock = install(monkeypatch, acme("attn.paged", "paged"), acme("attn.plan", "plan"))
    comparison = planned("attn.paged=reference", op="attn.paged")
    assert comparison.in_force.name == BODY
    assert [site.op for site in comparison.sites] == ["attn.rope_paged"]
    clock.took |= {"acme": 1, BODY: 10}
    outcome = compare(comparison, (2, 17), repeats=1)
    assert [title.split(",")[0] for title in outcome.titles] == [
        "attn.rope_paged: decode of 2", "attn.rope_paged: decode of 17", "attn.rope_paged: prompt of 17",
    ]  # fmt: skip
    assert outcome.best is not None and outcome.best.provider == "acme"
    assert comparison.flags("acme") == "--kernel attn.paged=acme"


def test_what_writes_no_keys_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, acme("attn.paged", "unwritten"), acme("attn.plan", "plan"))
    outcome = compare(planned("attn.paged=reference", op="attn.paged"), (2,), repeats=1)
    assert score(outcome, "acme").dropped.startswith("wrong result")


def test_a_whole_is_compared_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking another provider for a part takes apart the kernel that has it in it: that is what the layer would call."""
    both = acme("gemm.linear", "linear"), acme("gemm.linear_gated", "linear_gated")
    clock = install(monkeypatch, *both, kernel("other", 10))
    comparison = planned(op="gemm.linear")
    places = [(site.op, site.layer) for site in comparison.sites]
    assert ("gemm.linear_gated", "GateUpLinear") in places and ("gemm.linear", "GateUpLinear") not in places
    assert comparison.in_force.name == "acme"
    compare(comparison, (1,), repeats=1)
    assert [name for name, _, _ in clock.timed][-2:] == ["acme", "other"], (
        "the whole, and the activation as the last of its parts"
    )


def test_what_runs_the_same_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, BASE)
    assert [other.name for other in planned().others] == [BODY]
    comparison = planned("norm.add_rms=reference", op="norm.add_rms")
    assert (comparison.in_force.name, comparison.others) == (BODY, [])


def test_flags_keep_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, BASE, kernel("other", 10))
    comparison = planned("norm.rms=reference", f"{OP}=other")
    assert comparison.in_force.name == "other"
    assert comparison.flags("base") == "--kernel norm.rms=reference --kernel act.gated=base"
