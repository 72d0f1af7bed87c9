"""Work lists: every token's keys are visited once, buckets have room for what they may hold, and work is evened out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sglang_triton import attention_plan
from sglang_triton.attention_plan import ALIGN, MERGES, WorkPlan, plan, plan_invariant, plan_latents_tall, plan_tall
from triton_attention_cases import CPU, spec_of

from sglang_core.api.ops import AttnBatch, MLASpec

PLANS = [plan, plan_invariant, plan_tall]


@pytest.fixture(autouse=True)
def _no_cache() -> None:
    attention_plan.num_processors.cache_clear()


def batch_of(reqs: list[tuple[int, int]], *, bucket: tuple[int, int, int, int] | None = None) -> AttnBatch:
    """bucket: tokens, reqs, longest extend and pages that there is room for."""
    prefix, extend = (np.array(x, np.int32) for x in zip(*reqs, strict=True))
    pages = int(-(-(prefix + extend) // 16).max())
    tokens, num_reqs, longest, pages = bucket or (int(extend.sum()), len(reqs), int(extend.max()), pages)
    more = num_reqs - len(reqs)
    prefix, extend = np.pad(prefix, (0, more)), np.pad(extend, (0, more))
    return AttnBatch(
        cu_extend_cpu=torch.from_numpy(np.concatenate([[0], np.cumsum(extend)]).astype(np.int32)),
        prefix_lens_cpu=torch.from_numpy(prefix),
        seq_lens_cpu=torch.from_numpy(prefix + extend),
        page_table_cpu=torch.zeros(num_reqs, pages, dtype=torch.int32),
        slot_mapping_cpu=torch.zeros(tokens, dtype=torch.int32),
        num_tokens=tokens,
        num_reqs=num_reqs,
        max_extend=longest,
        num_pages=pages,
        page_size=16,
        static=bucket is not None,
    )


def items_of(made: WorkPlan) -> list[list[int]]:
    counts = made.work[0].tolist()
    return [row for i, t in enumerate(made.static.tiers) for row in made.work[t.first : t.first + counts[i]].tolist()]


def random_reqs(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(int(rng.integers(0, 5000)), int(rng.choice([1, 1, 1, 5, 40, 300]))) for _ in range(rng.integers(1, 9))]


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("window", [None, 700])
def test_each_token_visits_its_keys_once_and_all_results_are_merged(make, window) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        reqs = random_reqs(rng)
        made = make(spec_of(window=window), batch_of(reqs), CPU)
        position = [p + i for p, e in reqs for i in range(e)]
        visits: dict[int, list[tuple[int, int]]] = {}
        parts: dict[int, list[int]] = {}
        for token, count, _, at, begin, end, clip, part in items_of(made):
            assert begin % ALIGN == 0
            for i in range(count):
                assert position[token + i] == at + i
                visits.setdefault(token + i, []).append((max(begin, clip), end))
                parts.setdefault(token + i, []).append(part + i if part >= 0 else -1)
        assert visits.keys() == set(range(len(position)))
        for token, ranges in visits.items():
            ranges.sort()
            seen = position[token] - (window or position[token] + 1) + 1
            assert ranges[0][0] <= max(seen, 0)
            assert ranges[-1][1] > position[token]
            assert all(a[1] == b[0] for a, b in pairwise(ranges))
        first, count = made.static.first_merge, int(made.work[0, MERGES])
        merged = {}
        for token, splits, part, stride, *_ in made.work[first : first + count].tolist():
            merged[token] = [part + i * stride for i in range(splits)]
        assert merged == {token: sorted(of) for token, of in parts.items() if of != [-1]}
        every = sorted(part for of in merged.values() for part in of)
        assert every == list(range(len(every)))
        assert made.static.num_parts == len(every)


@pytest.mark.parametrize("make", PLANS)
def test_a_bucket_has_one_shape_and_room(make) -> None:
    rng = np.random.default_rng(1)
    bucket = (2500, 10, 300, 400)
    statics = set()
    for _ in range(40):
        made = make(spec_of(), batch_of(random_reqs(rng), bucket=bucket), CPU)
        statics.add(made.static)
        used = max((row[7] + row[1] for row in items_of(made)), default=0)
        assert used <= made.static.num_parts
    assert len(statics) == 1


def test_tiles_for_kernels_of_more_rows() -> None:
    """4 query heads a KV head: 100 tokens are two tiles of 64 tokens, and not four of 32."""
    spec, batch = spec_of(8, 2), batch_of([(0, 100)])
    assert [len(items_of(make(spec, batch, CPU))) for make in (plan_invariant, plan_tall)] == [4, 2]
    assert plan_tall(spec, batch, CPU).static.tiers[-1].rows == 256


def test_latents_for_a_kernel_of_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 heads are one tile, which two programs work on: two reqs fill four processors, and are cut for eight."""
    spec = MLASpec(num_heads=128, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=0.1)
    batch = batch_of([(4000, 1)] * 2)
    parts = []
    for processors in (4, 8):
        monkeypatch.setattr(attention_plan, "num_processors", lambda device, n=processors: n)
        made = plan_latents_tall(spec, batch, CPU)
        assert [(tier.rows, tier.tokens) for tier in made.static.tiers] == [(128, 1)]
        parts.append(len(items_of(made)))
    assert parts == [2, 4]


def test_an_earlier_plan_is_filled_in_place() -> None:
    bucket = (4, 4, 1, 400)
    first = plan(spec_of(), batch_of([(4, 1)], bucket=bucket), CPU)
    again = plan(spec_of(), batch_of([(700, 1), (80, 1)], bucket=bucket), CPU, first)
    assert again is first
    assert first.seq_lens.tolist() == [701, 81, 0, 0]
    with pytest.raises(AssertionError, match="another bucket"):
        plan(spec_of(), batch_of([(4, 1)]), CPU, first)


def test_decode_fills_a_large_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """132 processors: one req of 4k tokens is cut so that most have work; 512 reqs of short texts are not cut at all."""
    monkeypatch.setattr(attention_plan, "num_processors", lambda device: 132)
    llama = spec_of(32, 8, 128)
    lone = plan(llama, batch_of([(4095, 1)]), CPU)
    assert 132 <= int(lone.work[0, 0]) * 8 <= 4 * 3 * 132
    many = plan(llama, batch_of([(500, 1)] * 512), CPU)
    assert int(many.work[0, 0]) == 512
    assert not int(many.work[0, MERGES])


def test_one_long_text_among_short_ones_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "num_processors", lambda device: 132)
    made = plan(spec_of(32, 8, 128), batch_of([(99_999, 1)] + [(500, 1)] * 31), CPU)
    longest = max(end - begin for _, _, _, _, begin, end, _, _ in items_of(made))
    shared = (100_000 + 31 * 501) * 8 / (3 * 132)
    assert longest < 2 * shared  # what is left when all others are done is no longer than what each had to do
