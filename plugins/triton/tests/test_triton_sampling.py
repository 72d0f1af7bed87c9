"""sample.sample against its op body, through the interpreter, in chunks of several sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang_triton import sampling
from sglang_triton.sampling import sample

from sglang_core.api.ops import OPS, SampleParams

body = OPS["sample.sample"].body
ROWS = 40


def params(rows: int = ROWS, **given: object) -> SampleParams:
    """Rows in turn: greedy, plain, top-k, top-p, min-p, and all of these at once."""
    turn = lambda *values: torch.tensor(values).repeat(-(-rows // len(values)))[:rows]  # noqa: E731
    fields: dict[str, object] = {
        "temperature": turn(0.0, 1.0, 0.7, 1.3, 1.0, 0.9),
        "top_k": turn(4096, 4096, 5, 4096, 4096, 30).int(),
        "top_p": turn(1.0, 1.0, 1.0, 0.7, 1.0, 0.8),
        "min_p": turn(0.0, 0.0, 0.0, 0.0, 0.05, 0.01),
        "seeds": torch.arange(rows, dtype=torch.int32) * 7919 - 100,
        "positions": torch.arange(rows, dtype=torch.int32),
    }
    return SampleParams(**(fields | given))  # type: ignore[arg-type]


@pytest.fixture(autouse=True, params=[{"BLOCK_R": 64, "CHUNK": 1024}, {"BLOCK_R": 64, "CHUNK": 8192}], ids=str)
def _seeded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in many chunks, and whole."""
    monkeypatch.setattr(sampling, "choose", lambda op, **sizes: request.param)
    torch.manual_seed(0)


@pytest.mark.parametrize("vocab", [1, 37, 5000])
def test_every_kind_of_row(vocab: int) -> None:
    """A vocabulary of several chunks, whose last is not full; rows that are slices of something wider."""
    logits = (3 * torch.randn(ROWS, vocab + 5))[:, 5:]
    (ids, logprobs), (want, want_logprobs) = (f(logits, params(), logprobs=True) for f in (sample, body))
    assert torch.equal(ids, want)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)


def test_rows_without_filters() -> None:
    logits = 3 * torch.randn(ROWS, 5000)
    given = params(
        needs_filter=False, top_p=torch.ones(ROWS), min_p=torch.zeros(ROWS), top_k=torch.full((ROWS,), 5000).int()
    )
    assert torch.equal(sample(logits, given)[0], body(logits, given)[0])


def test_greedy_takes_the_lowest_of_equals() -> None:
    """In one chunk, and in two that lie apart."""
    logits = torch.randn(6, 9000).clamp(max=3.0)
    logits[:, [8600, 4500, 4501]] = 5.0
    ids, logprobs = sample(logits, params(6, all_greedy=True, temperature=torch.zeros(6)))
    assert ids.tolist() == [4500] * 6 and logprobs is None


def test_of_equals_the_lowest_ids_are_kept() -> None:
    """Top-k and top-p both end among tokens that are equal, over several chunks."""
    logits = torch.zeros(60, 3000)
    logits[:, ::3] = 4.0
    top_k = params(
        60, temperature=torch.ones(60), min_p=torch.zeros(60), top_p=torch.ones(60), top_k=torch.full((60,), 600).int()
    )
    assert torch.equal(sample(logits, top_k)[0], body(logits, top_k)[0])
    assert int(sample(logits, top_k)[0].max()) <= 3 * 600
    top_p = params(
        60,
        temperature=torch.ones(60),
        min_p=torch.zeros(60),
        top_k=torch.full((60,), 3000).int(),
        top_p=torch.full((60,), 0.25),
    )
    differs = sample(logits, top_p)[0] != body(logits, top_p)[0]
    assert int(differs.sum()) <= 1  # a number on the boundary of two of the 1000


def test_what_is_forbidden_is_never_drawn() -> None:
    logits = torch.full((ROWS, 5000), float("-inf"))
    allowed = torch.randint(0, 5000, (ROWS, 3))
    logits.scatter_(1, allowed, torch.randn(ROWS, 3))
    ids = sample(logits, params())[0]
    assert bool((allowed == ids[:, None]).any(1).all())
    assert torch.equal(ids, body(logits, params())[0])


def test_no_rows() -> None:
    ids, logprobs = sample(torch.empty(0, 50), params(0), logprobs=True)
    assert ids.shape == (0,) and logprobs is not None and logprobs.shape == (0, 50)


def few(rows: int = ROWS, **given: object) -> SampleParams:
    """Rows in turn: none but the first, a greedy one, and the fourth, of min-p alone, keeps more than 64 tokens."""
    turn = lambda *values: torch.tensor(values).repeat(-(-rows // len(values)))[:rows]  # noqa: E731
    kept = {"top_k": turn(9000, 1, 5, 9000, 64, 30).int(), "top_p": turn(1.0, 1.0, 1.0, 1.0, 0.7, 0.8)}
    return params(rows, **(kept | {"min_p": turn(0.0, 0.0, 0.0, 0.05, 0.0, 0.01), "max_top_k": 64} | given))


@pytest.mark.parametrize("vocab", [1, 37, 5000])
def test_rows_that_keep_few_tokens(vocab: int) -> None:
    logits = (3 * torch.randn(ROWS, vocab + 5))[:, 5:]
    (ids, logprobs), (want, want_logprobs) = (f(logits, few(), logprobs=True) for f in (sample, body))
    assert torch.equal(ids, want)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [0.0, 0.5, 4.0])
def test_few_of_many_that_are_equal(step: float) -> None:
    """More groups have the same largest logit than are looked at, and all but some tokens are masked in half of the rows."""
    logits = (torch.randn(ROWS, 9000) / max(step, 1e-30)).round().clamp(-1e6, 1e6) * step
    logits[::2, 100:] = float("-inf")
    ids, want = (f(logits, few(min_p=torch.zeros(ROWS)))[0] for f in (sample, body))
    assert int((ids != want).sum()) <= 1  # a number on the boundary of two that are equal


def test_a_share_of_nothing_keeps_one_token() -> None:
    logits = 3 * torch.randn(ROWS, 5000)
    ids, _ = sample(logits, few(top_p=torch.zeros(ROWS), top_k=torch.full((ROWS,), 50).int()))
    assert torch.equal(ids, logits.argmax(-1).int())


def test_few_are_cut_where_many_would_be() -> None:
    """Both ways know the same last token, and how many that equal it are kept."""
    logits = (2 * torch.randn(ROWS, 5000)).mul(4).round().div(4)
    given = few(top_k=torch.randint(1, 65, (ROWS,)).int(), top_p=torch.rand(ROWS))
    fast, slow = (sample(logits, replace(given, max_top_k=n))[0] for n in (64, 0))
    assert torch.equal(fast, slow)
