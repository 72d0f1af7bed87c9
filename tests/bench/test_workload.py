"""Workloads: exact lengths, prefixes that are really shared, and the same prompts for the same seed."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from sglang_core.bench.workload import from_file, poisson_arrivals, random_ids, shared_prefix
from sglang_core.errors import ConfigError


def test_random_ids_have_the_lengths_asked_for() -> None:
    prompts = random_ids(50, input_len=40, output_len=10, range_ratio=0.5, vocab_size=77, seed=3)
    assert len(prompts) == 50
    assert {len(p.input_ids or ()) for p in prompts} <= set(range(20, 41))
    assert {p.output_len for p in prompts} <= set(range(5, 11))
    assert max(max(p.input_ids or ()) for p in prompts) < 77


def test_range_ratio_one_is_exact() -> None:
    assert {len(p.input_ids or ()) for p in random_ids(9, input_len=40, output_len=4)} == {40}


def test_shared_prefix_shares_exactly_the_prefix() -> None:
    prompts = shared_prefix(6, groups=2, prefix_len=30, suffix_len=5, output_len=7, vocab_size=10_000)
    ids = [p.input_ids or [] for p in prompts]
    assert [len(i) for i in ids] == [35] * 6
    assert ids[0][:30] == ids[2][:30] == ids[4][:30] != ids[1][:30]
    assert len({tuple(i[30:]) for i in ids}) == 6


@pytest.mark.parametrize("make", [random_ids, shared_prefix])
def test_a_seed_gives_the_same_prompts_and_another_gives_others(make: object) -> None:
    settings = (
        {"input_len": 8, "output_len": 2}
        if make is random_ids
        else {"groups": 2, "prefix_len": 8, "suffix_len": 2, "output_len": 2}
    )

    def drawn(seed: int) -> object:
        return make(4, seed=seed, **settings)  # type: ignore[operator]

    assert drawn(1) == drawn(1) != drawn(2)


def test_words_keep_shared_prefixes_shared() -> None:
    a, b = shared_prefix(2, groups=1, prefix_len=4, suffix_len=1, output_len=1)
    assert a.as_words().split()[:4] == b.as_words().split()[:4]


def test_poisson_arrivals_have_their_rate() -> None:
    arrivals = poisson_arrivals(4001, 20.0, seed=1)
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) >= 0
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.05)
    # An exponential distribution's deviation is its mean.
    assert math.sqrt(sum((g - 0.05) ** 2 for g in gaps) / len(gaps)) == pytest.approx(1 / 20, rel=0.08)


def test_an_infinite_rate_sends_at_once() -> None:
    assert poisson_arrivals(3, math.inf) == [0.0, 0.0, 0.0]


def test_files_in_three_shapes(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    items = [{"prompt": "hi", "output_len": 3}, {"prompt": [1, 2]}, {"conversations": [{"from": "gpt", "value": "x"}]}]
    lines.write_text("\n".join(map(json.dumps, items)))
    prompts = from_file(str(lines), 2, output_len=9)
    assert {(p.text, tuple(p.input_ids or ()), p.output_len) for p in prompts} == {("hi", (), 3), (None, (1, 2), 9)}
    sharegpt = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "first"}, {"from": "gpt", "value": "no"}, {"from": "human", "value": "second"}]
    sharegpt.write_text(json.dumps([{"conversations": turns}]))
    assert from_file(str(sharegpt), 1, output_len=9)[0].text == "first"


def test_a_file_with_too_few_prompts_says_how_many(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one"}')
    with pytest.raises(ConfigError, match=r"has 1 usable prompts; set --num-prompts"):
        from_file(str(path), 2, output_len=1)
    with pytest.raises(ConfigError, match="cannot be read"):
        from_file(str(tmp_path / "none"), 1, output_len=1)
