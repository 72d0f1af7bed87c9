"""Our logits are transformers', however a request is cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.harness import PAGE_SIZE, Row, Stepper, load
from tests.models.tiny import CASES, NUM_NEW, PROMPT_LENS, Reference, reference

BOUND = 1e-4  # float32 on both sides: only the order of sums differs


@pytest.fixture(scope="module", params=CASES)
def ready(request: pytest.FixtureRequest, checkpoints: Path) -> tuple[Stepper, Reference]:
    ref = reference(request.param, checkpoints)
    return Stepper(load(ref.folder, context_length=CASES[request.param].context_length)), ref


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def test_logits_are_worth_comparing(ready: tuple[Stepper, Reference]) -> None:
    assert min(float(logits.std()) for logits in ready[1].logits) >= 1


def test_prefill_of_a_batch(ready: tuple[Stepper, Reference]) -> None:
    stepper, ref = ready
    ours = stepper.step([(Row(), tokens) for tokens in ref.tokens])
    assert max(error(a, b) for a, b in zip(ours, ref.logits, strict=True)) < BOUND


def test_chunked_prefill_mixed_with_decode(ready: tuple[Stepper, Reference]) -> None:
    """Req 0 goes in chunks of 5, req 1 token by token from the start, req 2 in two steps, all in the same batches."""
    stepper, ref = ready
    rows, sizes = [Row() for _ in ref.tokens], (5, 1, 11)
    parts: list[list[Tensor]] = [[] for _ in rows]
    while work := [i for i, row in enumerate(rows) if row.num_tokens < len(ref.tokens[i])]:
        starts = [rows[i].num_tokens for i in work]
        chunks = [ref.tokens[i][s : s + sizes[i]] for i, s in zip(work, starts, strict=True)]
        for i, logits in zip(
            work, stepper.step([(rows[i], c) for i, c in zip(work, chunks, strict=True)]), strict=True
        ):
            parts[i].append(logits)
    assert max(error(torch.cat(p), b) for p, b in zip(parts, ref.logits, strict=True)) < BOUND


def test_greedy_decode_gives_the_same_tokens(ready: tuple[Stepper, Reference]) -> None:
    stepper, ref = ready
    rows = [Row() for _ in ref.tokens]
    prompts = [t[:n] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]
    logits = stepper.step(list(zip(rows, prompts, strict=True)))
    made: list[list[int]] = [[] for _ in rows]
    for step in range(NUM_NEW):
        for i, row_logits in enumerate(logits):
            position = PROMPT_LENS[i] - 1 + step
            assert error(row_logits[-1], ref.logits[i][position]) < BOUND
            made[i].append(int(row_logits[-1].argmax()))
        logits = stepper.step([(row, made[i][-1:]) for i, row in enumerate(rows)])
    assert made == [t[n:] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]


def test_prefix_pages_of_another_req_are_reused(ready: tuple[Stepper, Reference]) -> None:
    stepper, ref = ready
    tokens = ref.tokens[0]
    first = Row()
    for part in (tokens[:PAGE_SIZE], tokens[PAGE_SIZE : 4 * PAGE_SIZE], tokens[4 * PAGE_SIZE :]):
        stepper.step([(first, part)])  # a state that shall be reused must have been kept: there the steps end
    for num_pages in (1, 4):
        hit = stepper.share_prefix(first, num_pages * PAGE_SIZE)
        fresh = Row()
        ours, beside = stepper.step([(hit, tokens[num_pages * PAGE_SIZE :]), (fresh, ref.tokens[1])])
        assert error(ours, ref.logits[0][num_pages * PAGE_SIZE :]) < BOUND
        assert error(beside, ref.logits[1]) < BOUND
