"""Draws against the op's body, given the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_xeon import sampling

from sglang_core.api.ops import OPS, SampleParams

BODY = OPS["sample.sample"].body
ROWS = 300


def params(rows: int, vocab: int, **given: Any) -> SampleParams:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": vocab, "min_p": 0.0} | given
    static = {name: fields.pop(name) for name in ("all_greedy", "needs_filter", "max_top_k") if name in fields}
    made = {
        name: torch.as_tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32).expand(rows).contiguous()
        for name, value in fields.items()
    }
    seeds = torch.randint(-(2**31), 2**31 - 1, (rows,)).int()
    return SampleParams(**made, seeds=seeds, positions=torch.randint(0, 100_000, (rows,)).int(), **static)


def cycle(*values: float) -> torch.Tensor:
    return torch.tensor(values).repeat(-(-ROWS // len(values)))[:ROWS]


FILTERS: dict[str, dict[str, Any]] = {
    "none": {"needs_filter": False},
    "none, hot": {"temperature": 3.0, "needs_filter": False},
    "top-k": {"top_k": 7},
    "top-k larger than the runs": {"top_k": 1500},
    "top-p": {"top_p": 0.9},
    "small top-p": {"top_p": 1e-6},
    "top-p 0": {"top_p": 0.0},
    "top-p of top-k": {"top_k": 40, "top_p": 0.5},
    "top-p of a large top-k": {"top_k": 2500, "top_p": 0.95, "temperature": 4.0},
    "min-p": {"min_p": 0.05},
    "min-p of top-k": {"min_p": 0.2, "top_k": 3},
    "all": {"min_p": 0.02, "top_k": 100, "top_p": 0.8},
    "flat top-p": {"top_p": 0.9, "temperature": 50.0},
}


def unlike(logits: torch.Tensor, given: SampleParams) -> float:
    """The share of rows that differ from the body's, in float64 if need be: a number may fall on a boundary."""
    ids, _ = sampling.sample(logits, given)
    assert ids.dtype == torch.int32
    return float((ids != BODY(logits, given)[0]).double().mean())


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [3000, 4097])
def test_draws_are_the_bodys(level: str, name: str, vocab: int) -> None:
    assert unlike(torch.randn(ROWS, vocab) * 3, params(ROWS, vocab, **FILTERS[name])) <= 0.01


@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p"])
def test_draws_where_every_logit_is_below_zero(level: str, name: str) -> None:
    assert unlike(torch.randn(ROWS, 3000) * 3 - 300, params(ROWS, 3000, **FILTERS[name])) <= 0.01


@pytest.mark.parametrize("scale", [0.0, 0.1, 30.0])
def test_flat_and_peaked_rows(level: str, scale: float) -> None:
    """All equal: the buckets hold one value; 30: one token has nearly all."""
    for given in ({"top_p": 0.7}, {"top_k": 2200}, {"top_k": 30, "top_p": 0.6}):
        assert unlike(torch.randn(40, 2500) * scale, params(40, 2500, **given)) <= 0.05


def test_every_row_its_own(level: str) -> None:
    given = {
        "temperature": cycle(0.0, 0.7, 1.0, 1.5, 1e-5, 0.9e-5),
        "top_p": cycle(1.0, 0.9, 0.5),
        "top_k": cycle(3001, 20, 1, 5, 50),
        "min_p": cycle(0.0, 0.0, 0.1),
    }
    assert unlike(torch.randn(ROWS, 3001) * 4, params(ROWS, 3001, **given)) <= 0.01


def test_ties_rank_by_id(level: str) -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 3.0]).expand(ROWS, 6).contiguous()
    ids, _ = sampling.sample(logits, params(ROWS, 6, top_k=2))
    assert set(ids.tolist()) == {1, 2}


@pytest.mark.parametrize("given", [{"top_k": 700}, {"top_k": 2990}, {"top_p": 0.5}, {"top_k": 1500, "top_p": 0.9}])
def test_a_cut_among_hundreds_of_equals(level: str, given: dict[str, Any]) -> None:
    """Of equal logits those with the lowest ids stay, as many as there is room for."""
    logits = torch.randint(0, 4, (ROWS, 3001)).float() * 0.5
    assert unlike(logits, params(ROWS, 3001, **given)) <= 0.01


def test_bfloat16_logits(level: str) -> None:
    """They tie often. Rows of one draw each: the body takes float32."""
    logits = (torch.randn(ROWS, 3000) * 3).bfloat16()
    assert unlike(logits, params(ROWS, 3000, top_k=50, top_p=0.9)) <= 0.01


def test_masked_and_odd_rows(level: str) -> None:
    logits = torch.full((5, 2000), float("-inf"))
    logits[0, 1234] = -5.0
    logits[1, [7, 1999]] = 1.0
    logits[2] = float("nan")
    logits[3, 77] = float("inf")
    for given in ({"needs_filter": False}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 1900, "top_p": 0.5}, {"min_p": 0.5}):
        ids = sampling.sample(logits, params(5, 2000, **given))[0].tolist()
        assert ids[0] == 1234
        assert ids[1] in (7, 1999)
        assert all(0 <= i < 2000 for i in ids)


def test_a_draw_is_its_rows_own(level: str) -> None:
    logits, given = torch.randn(64, 5000) * 3, params(64, 5000, top_p=0.9)
    whole = sampling.sample(logits, given)[0]
    one = SampleParams(
        **{
            name: getattr(given, name)[9:10]
            for name in ("temperature", "top_p", "top_k", "min_p", "seeds", "positions")
        }
    )
    assert sampling.sample(logits[9:10], one)[0] == whole[9]


def test_logprobs_are_of_the_logits_as_given(level: str) -> None:
    logits = torch.randn(4, 100)
    found = sampling.sample(logits, params(4, 100, temperature=0.3, top_k=2), logprobs=True)[1]
    torch.testing.assert_close(found, torch.log_softmax(logits, -1))


def test_wrong_sizes_are_refused(level: str) -> None:
    with pytest.raises(RuntimeError, match="temperature must be 3 of float32"):
        sampling.sample(torch.randn(3, 10), params(2, 10))
