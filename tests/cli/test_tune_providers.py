"""`sglang-core tune --providers`: what is printed, and exit statuses."""

from __future__ import annotations

import json

import pytest

from sglang_core.backend.torch_runtime import TorchRuntime
from tests.bench.fake_providers import OP, install, kernel

from .conftest import Cli, Outcome

BASE = kernel("base", 90)
NOT_HERE = kernel("absent", 20, why_not="its library is not installed")


def tune(cli: Cli, *flags: str, op: str = OP) -> Outcome:
    which = "--device", "cpu", "--model-path", "demo", "--dtype", "float32", "--tokens", "1,2"
    return cli("tune", "--op", op, "--providers", *flags, *which)


def test_what_to_serve_with_is_the_last_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, BASE, kernel("other", 30), kernel("wrong", 10), kernel("raises", 5), NOT_HERE)
    clock.took |= {"base": 10, "other": 4, "reference": 20}
    outcome = tune(cli)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[-2:] == [
        "other is 2.50x as fast as base, which is in force, by the geometric mean of 2 calls. Serve with",
        "    --kernel act.gated=other",
    ]
    assert any("2 tokens" in line and "10000.0" in line and "4000.0 (0.40)" in line for line in lines)
    assert "out: wrong: wrong result (GatedMLP silu of 512, 1 tokens)" in lines
    assert "out: raises: raised MemoryError: out of shared memory (GatedMLP silu of 512, 1 tokens)" in lines
    assert "refused: absent: at act.gated in GatedMLP (float32): its library is not installed" in lines


def test_the_one_in_force_may_be_the_best(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, BASE).took |= {"base": 10, "reference": 9.9}
    assert "base, which is in force, is the best: nothing is 2% faster" in tune(cli).out
    install(monkeypatch)
    assert "reference is in force, and no other provider runs here" in tune(cli).out
    install(monkeypatch, BASE, kernel("wrong", 10))
    assert "base is in force, and nothing else is right on every call" in tune(cli, "wrong").out


def test_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, BASE, kernel("other", 30), kernel("wrong", 10), NOT_HERE).took |= {"base": 10, "other": 5}
    report = json.loads(tune(cli, "--json").out)
    assert report["in_force"] == "base" and report["best"] == "other" and report["flags"] == "--kernel act.gated=other"
    assert report["calls"][1]["providers"]["other"] == [0.005, 0.01]
    assert report["ratios"]["other"] == pytest.approx(0.5)
    assert list(report["out"]) == ["wrong"] and list(report["refused"]) == ["absent"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_dry_run_opens_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    clock = install(monkeypatch, BASE, kernel("raises", 10), NOT_HERE)
    monkeypatch.setattr(TorchRuntime, "__init__", None)
    outcome = tune(cli, "--dry-run", *flags)
    assert outcome.status == 0 and not clock.timed
    for words in ("base", "raises", "reference", "its library is not installed", "act.gated of GatedMLP, 2 tokens"):
        assert words in outcome.out


@pytest.mark.parametrize(
    ("flags", "op", "status", "words"),
    [
        ((), "act.gatd", 2, "is no op (did you mean 'act.gated'?)"),
        ((), "sample.sample", 2, "is one of which no calls are built; providers can be compared of moe.fused"),
        ((), "moe.fused", 2, "demo has no moe.fused; providers can be compared of act.gated, attn.paged"),
        (("othr",), OP, 2, "--providers othr has no act.gated (did you mean 'other'?); it is provided by base, other, reference"),
        (("--out", "x"), OP, 2, "--out is where configs go"),
        (("--kernel", "act.gated=nobody"), OP, 1, "act.gated is provided by base, other, reference"),
        (("--kernel", "act.gated=wrong"), OP, 1, "wrong result"),
    ],
)  # fmt: skip
def test_errors_say_what_there_is(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], op: str, status: int, words: str
) -> None:
    kernels = BASE, kernel("other", 10)
    if "act.gated=wrong" in flags:
        kernels, words = (*kernels, kernel("wrong", 5)), "the provider (wrong) in force"
    install(monkeypatch, *kernels)
    outcome = tune(cli, *flags, op=op)
    assert (outcome.status, outcome.out) == (status, "")
    assert words in outcome.err
