"""The bench commands: their flags, and a real (small) run of each on the reference backend."""

from __future__ import annotations

import argparse
import json

import pytest

from sglang_core.cli.bench_step import numbers
from sglang_core.cli.parser import Parser
from sglang_core.cli.workload_flags import add_workload, build_prompts
from sglang_core.errors import ConfigError

from .conftest import Cli

DEMO = ("--model-path", "demo", "--device", "cpu", "--dtype", "float32")


def workload(*argv: str) -> argparse.Namespace:
    parser = Parser("bench serve", "", "", argv)
    add_workload(parser)
    return parser.parse()


def test_workload_flags_reach_the_prompts() -> None:
    prompts = build_prompts(workload("--num-prompts", "3", "--input-len", "9", "--output-len", "2"), vocab_size=50)
    assert [(len(p.input_ids or ()), p.output_len) for p in prompts] == [(9, 2)] * 3
    shared = workload("--dataset", "shared-prefix", "--num-prompts", "2", "--prefix-len", "6", "--suffix-len", "1")
    a, b = (p.input_ids or [] for p in build_prompts(shared, vocab_size=50))
    assert (a[:6] == b[:6], len(a)) == (True, 7)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["--range-ratio", "2"], "--range-ratio 2.0 must be above 0"),
        (["--dataset", "file"], "needs --dataset-path"),
    ],
)
def test_workloads_that_are_none_say_why(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_prompts(workload(*argv), vocab_size=50)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "--request-rate", "0"], "--request-rate 0.0 must be above 0, or inf"),
        (["serve", "--max-concurrency", "0"], "--max-concurrency 0 must be at least 1"),
        (["serve", "--extra-body", "[1]"], "must be a JSON object"),
        (["serve", "--route", "embeddings"], "invalid choice: 'embeddings'"),
        (["step", "--model-path", "demo", "--length", "1,x"], "--length '1,x' must be whole numbers"),
        (["offline", "--model-path", "demo", "--num-runs", "0"], "--num-runs 0 must be at least 1"),
        (["step", "--model-path", "demo", "--tp", "2"], "single steps are measured on one rank"),
    ],
)
def test_wrong_usage(cli: Cli, argv: list[str], words: str) -> None:
    outcome = cli("bench", *argv)
    assert outcome.status == 2
    assert words in outcome.err


def test_no_server_fails_in_one_line(cli: Cli) -> None:
    outcome = cli("bench", "serve", "--url", "http://127.0.0.1:9")
    assert (outcome.status, outcome.out) == (1, "")
    assert "no server answers at http://127.0.0.1:9" in outcome.err


def test_numbers() -> None:
    assert numbers("--x", "1,8") == [1, 8]
    with pytest.raises(ConfigError):
        numbers("--x", "0")


def test_offline_runs_the_demo_model(cli: Cli) -> None:
    small = ("--num-prompts", "3", "--input-len", "20", "--output-len", "4", "--num-runs", "2", "--json")
    outcome = cli("bench", "offline", *DEMO, *small)
    assert outcome.status == 0, outcome.err
    document = json.loads(outcome.out)
    assert len(document["runs"]) == 2
    facts = document["median"]
    assert (facts["num_requests"], facts["prompt_tokens"], facts["output_tokens"], facts["cached_tokens"]) == (
        3,
        60,
        12,
        0,
    )
    assert facts["requests_per_s"] == pytest.approx(3 / facts["seconds"])


def test_step_times_the_demo_model(cli: Cli) -> None:
    outcome = cli("bench", "step", *DEMO, "--batch-size", "1,2", "--length", "24", "--repeats", "2", "--json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(outcome.out)
    shapes = [(r["mode"], r["num_reqs"], r["length"]) for r in rows]
    assert shapes == [("prefill", 1, 24), ("prefill", 2, 24), ("decode", 1, 24), ("decode", 2, 24)]
    assert all(r["median_s"] >= r["best_s"] > 0 for r in rows)


def test_profile_finds_every_op_of_the_demo_model(cli: Cli) -> None:
    outcome = cli("profile", *DEMO, "--batch-size", "2", "--length", "24", "--repeats", "2", "--json")
    assert outcome.status == 0, outcome.err
    document = json.loads(outcome.out)
    for phase in ("prefill", "decode"):
        ops = document[phase]["ops"]
        assert {"attn.paged", "gemm.linear", "norm.rms", "sample.sample"} <= {o["op"] for o in ops}
        assert {o["provider"] for o in ops} == {"reference"}
        assert [o["seconds"] for o in ops] == sorted((o["seconds"] for o in ops), reverse=True)
        assert sum(o["seconds"] for o in ops) <= document[phase]["seconds"]
