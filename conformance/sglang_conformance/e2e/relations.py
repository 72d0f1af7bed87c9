"""What must hold between two runs of an engine with the same prompts. Greedy answers are the same tokens, but for ties.

Tokens that are the same do not say much: most logits are far apart. So the log-probabilities that each token was taken from are compared
too, as long as the texts before them are the same. Where two of a row are closer than rounding may move them, two runs may take
either (`tolerance.may_part`; in float32 that is one token in ten thousand); from there on they are different texts, and not compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_conformance.e2e.engine import Answer
from sglang_conformance.e2e.env import EngineEnv
from sglang_conformance.tolerance import compare_texts, may_part


def same_answers(what: str, env: EngineEnv, got: Sequence[Answer], want: Sequence[Answer]) -> None:
    """Raises AssertionError where an answer of `got` is another than that of `want` to the same prompt."""
    rows, other_rows = [], []
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.prompt == y.prompt, "the same prompts in the same order"
        for answer in (x, y):
            check_greedy(answer)
        assert len(x.tokens) == len(y.tokens), f"{what}: {len(x.tokens)} tokens, and {len(y.tokens)} before"
        parts = next((i for i, pair in enumerate(zip(x.tokens, y.tokens, strict=True)) if pair[0] != pair[1]), None)
        if parts is not None:
            token, other = x.tokens[parts], y.tokens[parts]
            assert may_part(y.rows[parts], token, other, env.dtype, routed=env.model.routed), (
                f"{what}: token {parts} of answer {number} is {token}, and must be {other}, which is no tie"
            )
        alike = len(x.tokens) if parts is None else parts + 1
        rows += x.rows[:alike]
        other_rows += y.rows[:alike]
    same_rows(what, env, rows, other_rows)


def same_rows(what: str, env: EngineEnv, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Raises AssertionError where log-probabilities of one text differ by more than rounding. Rows: [V]."""
    problem = compare_texts(torch.stack(list(got)), torch.stack(list(want)), env.dtype, routed=env.model.routed)
    assert problem is None, f"{what}: {problem}"


def check_greedy(answer: Answer) -> None:
    """Each token is one of the likeliest."""
    for row, token in zip(answer.rows, answer.tokens, strict=True):
        assert float(row[token]) == float(row.max()), f"token {token} was taken, and is not the likeliest"
