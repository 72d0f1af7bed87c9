"""Filters against a NumPy oracle written per row; frequencies against the distribution asked for; rows on their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_core.ops.sampling import SampleParams, fold_seed, sample, token_logprobs, top_logprobs, uniform

ROWS = 20_000


def params(rows: int, vocab: int, **given: Any) -> SampleParams:
    """Scalars or lists by field name; positions count up."""
    fields: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": vocab,
        "min_p": 0.0,
        "seeds": 7,
        "positions": list(range(rows)),
    }
    static = {name: given.pop(name) for name in ("all_greedy", "needs_filter", "max_top_k") if name in given}
    ints = ("top_k", "seeds", "positions")
    tensors = {
        name: torch.as_tensor(value, dtype=torch.int32 if name in ints else torch.float32).expand(rows)
        for name, value in (fields | given).items()
    }
    return SampleParams(**tensors, **static)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution one row is sampled from, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled - scaled.max())
    keep = np.zeros(len(p), bool)
    keep[order[:top_k]] = True
    p = np.where(keep, p, 0)
    p /= p.sum()
    if top_p < 1:
        mass = 0.0
        keep[:] = False
        for token in order:
            keep[token] = True
            mass += p[token]
            if mass >= top_p:
                break
        p = np.where(keep, p, 0)
        p /= p.sum()
    p = np.where(p >= min(min_p, 1.0) * p.max(), p, 0)
    return p / p.sum()


def frequencies(logits: torch.Tensor, **given: Any) -> tuple[np.ndarray, np.ndarray]:
    """How often each token of one row comes out of ROWS draws, and how often it should."""
    vocab = len(logits)
    ids, _ = sample(logits.expand(ROWS, vocab), params(ROWS, vocab, **given))
    wanted = {"temperature": 1.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0} | given
    p = oracle(logits.numpy(), **{name: wanted[name] for name in ("temperature", "top_k", "top_p", "min_p")})
    return np.bincount(ids.numpy(), minlength=vocab), p * ROWS


LOGITS = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
        {"seeds": -12345, "top_p": 0.999},
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(given: dict[str, Any]) -> None:
    seen, wanted = frequencies(LOGITS, **given)
    assert (seen[wanted == 0] == 0).all()
    some = wanted > 0
    chi_square = float(((seen - wanted)[some] ** 2 / wanted[some]).sum())
    freedom = int(some.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * max(freedom, 1))  # five standard deviations; the draw is fixed


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(1, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
    temperature=st.floats(0.2, 4.0),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_support_is_the_oracles(
    top_k: int, top_p: float, min_p: float, temperature: float, seed: int, ties: bool
) -> None:
    """Every token that should come comes, given enough rows, and no other."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    p = oracle(logits.numpy(), **given)
    rows = 3000
    ids, _ = sample(logits.expand(rows, 12), params(rows, 12, **given))
    came = np.bincount(ids.numpy(), minlength=12) > 0
    likely = p > 0.01
    edge = ~np.isclose(p, 0) & ~likely  # too rare to come for sure
    borderline = _borderline(logits, given)
    assert (came == (p > 0))[~edge & ~borderline].all()


def _borderline(logits: torch.Tensor, given: dict[str, Any]) -> np.ndarray:
    """Tokens that a change of a filter by rounding would let in or out."""
    up = {name: value * (1 + 1e-5) if name in ("top_p", "min_p") else value for name, value in given.items()}
    down = {name: value * (1 - 1e-5) if name in ("top_p", "min_p") else value for name, value in given.items()}
    return (oracle(logits.numpy(), **up) > 0) != (oracle(logits.numpy(), **down) > 0)


def test_ties_rank_by_id() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    ids, _ = sample(logits.expand(500, 5), params(500, 5, top_k=2))
    assert set(ids.tolist()) == {1, 2}
    ids, _ = sample(logits.expand(500, 5), params(500, 5, top_p=0.3))
    assert set(ids.tolist()) == {1}


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.4, {0}), (0.5001, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2}), (0.01, {0})):
        ids, _ = sample(logits.expand(2000, 4), params(2000, 4, top_p=top_p))
        assert set(ids.tolist()) == kept


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids, _ = sample(logits.expand(2000, 4), params(2000, 4, top_k=2, top_p=0.55))  # 0.4 / 0.7 = 0.57
    assert set(ids.tolist()) == {0}


def test_greedy_rows_take_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -1.0], [2.0, 0.0, 0.0, 2.0]])
    for more in ({}, {"all_greedy": True}, {"needs_filter": False}):
        ids, _ = sample(logits, params(2, 4, temperature=0.0, **more))
        assert ids.tolist() == [1, 0]
        assert ids.dtype == torch.int32


MIXED = {
    "temperature": [1.0, 0.0, 0.7, 2.0, 1.0, 1.0],
    "top_p": [1.0, 1.0, 0.9, 0.5, 1.0, 0.95],
    "top_k": [300, 300, 300, 20, 1, 50],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.2],
    "seeds": [1, 2, 3, 4, 5, 2**31 - 1],
    "positions": [0, 10, 20, 30, 40, 2**20],
}


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = torch.randn(6, 300)
    together, _ = sample(logits, params(6, 300, **MIXED))
    for r in range(6):
        own = {name: values[r] for name, values in MIXED.items()}
        filtered = own["top_p"] < 1 or own["top_k"] < 300 or own["min_p"] > 0
        alone, _ = sample(logits[r : r + 1], params(1, 300, needs_filter=filtered, **own))
        assert alone[0] == together[r]
        padded, _ = sample(
            torch.cat([logits[r : r + 1], torch.zeros(9, 300)]),
            params(10, 300, **{**own, "seeds": [own["seeds"]] + [0] * 9, "positions": [own["positions"]] + [0] * 9}),
        )
        assert padded[0] == together[r]


def test_knowing_the_largest_top_k_changes_nothing() -> None:
    logits = torch.randn(500, 300).round(decimals=1)  # many ties
    some = {"top_k": [3, 20] * 250, "top_p": [0.7, 1.0, 0.95, 1.0, 0.3] * 100, "min_p": [0.0, 0.1] * 250}
    whole, _ = sample(logits, params(500, 300, **some))
    for depth in (20, 64):
        shallow, _ = sample(logits, params(500, 300, max_top_k=depth, **some))
        assert torch.equal(shallow, whole)


def test_rows_without_a_filter_keep_all_where_top_k_is_known() -> None:
    logits = torch.zeros(3000, 64)
    ids, _ = sample(logits, params(3000, 64, top_k=[64, 2] * 1500, max_top_k=2))
    assert len(set(ids[::2].tolist())) == 64
    assert set(ids[1::2].tolist()) == {0, 1}


def test_masked_tokens_never_come() -> None:
    logits = torch.full((5000, 10), -math.inf)
    logits[:, [2, 7]] = torch.tensor([0.0, 1.0])
    for more in ({}, {"top_k": 5}, {"top_p": 0.99}, {"needs_filter": False}, {"temperature": 100.0}):
        ids, _ = sample(logits, params(5000, 10, **more))
        assert set(ids.tolist()) == {2, 7}


def test_a_row_of_nan_still_gives_an_id_in_range() -> None:
    ids, _ = sample(torch.full((3, 10), math.nan), params(3, 10, top_p=0.9))
    assert ((ids >= 0) & (ids < 10)).all()


def test_logprobs_are_of_the_logits_given() -> None:
    logits = torch.randn(4, 50)
    ids, logprobs = sample(logits.bfloat16(), params(4, 50, temperature=0.3, top_k=2), logprobs=True)
    assert logprobs is not None
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.bfloat16().float().log_softmax(-1))
    torch.testing.assert_close(token_logprobs(logprobs, ids), logprobs[torch.arange(4), ids])
    top_ids, values = top_logprobs(logprobs, 3)
    assert top_ids.dtype == torch.int32
    torch.testing.assert_close(values, logprobs.sort(-1, descending=True).values[:, :3])
    torch.testing.assert_close(logprobs.gather(1, top_ids.long()), values)
    assert top_logprobs(logprobs, 80)[0].shape == (4, 50)
    assert sample(logits, params(4, 50))[1] is None


def test_no_rows() -> None:
    ids, logprobs = sample(torch.zeros(0, 9), params(0, 9, positions=[]), logprobs=True)
    assert ids.shape == (0,)
    assert logprobs is not None
    assert logprobs.shape == (0, 9)


def test_uniform_numbers_are_what_other_devices_must_draw() -> None:
    """The hash in Python integers: a kernel that draws elsewhere draws other tokens."""

    def mix(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    seeds, positions = [0, 1, -1, 2**31 - 1, -(2**31), 12345], [0, 1, 2, 100_000, 2**31 - 1, 7]
    want = [
        (mix(mix((s + 0x9E3779B9) & 0xFFFFFFFF) ^ ((p * 0x27D4EB2F) & 0xFFFFFFFF)) >> 8) / 2**24
        for s, p in zip(seeds, positions, strict=True)
    ]
    got = uniform(torch.tensor(seeds, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32))
    assert got.tolist() == want


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniform_numbers_are_even_and_do_not_follow_each_other(along: str) -> None:
    count, same = torch.arange(100_000, dtype=torch.int32), torch.full((100_000,), 3, dtype=torch.int32)
    u = uniform(count, same) if along == "seeds" else uniform(same, count)
    bins = torch.histc(u, 100, 0, 1)
    assert float(((bins - 1000) ** 2 / 1000).sum()) < 99 + 5 * math.sqrt(2 * 99)
    follow = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(float(follow)) < 0.02
    assert float(u.max()) < 1


def test_seeds_of_any_size_fold() -> None:
    assert fold_seed(5) == 5
    assert fold_seed(-1) == 0
    assert fold_seed(2**31) == -(2**31)
    assert all(-(2**31) <= fold_seed(s) < 2**31 for s in (2**63, -(2**63), 2**64 - 1, 10**30))
    assert fold_seed(1 << 32) != fold_seed(1 << 33)
