"""Draws are defined to the bit of the hash; what may differ is a row whose number falls on a boundary by rounding.

Beside that, draws are compared with the probabilities they come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_conformance.tolerance import check_draws
from sglang_core.ops.sampling import SampleParams

ROWS, VOCAB = 600, 1000
BOUNDARY = 0.005  # of the rows: 1000 sums of float32 differ by 1e-6 of the mass or so
WHOLE_VOCAB = 151_936  # of a model: past what 16 bits count, and many blocks of any kernel
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}


def make_params(env: Env, rows: int, static: dict[str, Any] | None = None, **given: Any) -> SampleParams:
    """`given`: a value for all rows, or one a row. Seeds and positions of any size."""
    fields = {
        name: torch.as_tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in (PLAIN | given).items()
    }
    return SampleParams(
        **{name: x.expand(rows).contiguous().to(env.device) for name, x in fields.items()},  # float32 in the oracle too
        seeds=env.integers(-(2**31), 2**31 - 1, rows),
        positions=env.integers(0, 100_000, rows),
        **(static or {}),
    )


def sampled(env: Env, logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Outputs:
    ids, found = env.op("sample.sample", dims={"V": logits.shape[1]})(logits, params, logprobs=logprobs)
    return {"ids": ids} if found is None else {"ids": ids, "logprobs": found}


def draw(env: Env, *, static: dict[str, Any] | None = None, logprobs: bool = False, **given: Any) -> Outputs:
    logits = env.normal(ROWS, VOCAB, scale=3.0)
    params = make_params(env, ROWS, static, **({"top_k": VOCAB} | given))
    return sampled(env, logits, params, logprobs=logprobs)


def cycle(*values: float, rows: int = ROWS) -> Tensor:
    """The values over and over, one a row."""
    return torch.tensor(values).repeat(-(-rows // len(values)))[:rows]


MIXED: dict[str, Any] = {
    "temperature": cycle(0.0, 0.7, 1.0, 1.5),
    "top_p": cycle(1.0, 0.9, 0.5),
    "top_k": cycle(VOCAB, 20, 1, 5, 50),
    "min_p": cycle(0.0, 0.0, 0.1),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"static": {"needs_filter": False}},
    "temperature": {"temperature": 0.6, "static": {"needs_filter": False}},
    "greedy": {"temperature": 0.0, "static": {"all_greedy": True}},
    "top-k": {"top_k": 10},
    "top-k, known": {"top_k": cycle(3, 20), "static": {"max_top_k": 20}},
    "top-p": {"top_p": 0.8},
    "small top-p": {"top_p": 0.2},
    "min-p": {"min_p": 0.1},
    "top-k, top-p, known": {"top_k": 20, "top_p": 0.9, "static": {"max_top_k": 64}},
    "every row its own": MIXED,
    "logprobs": {"temperature": 0.5, "logprobs": True},
    # One token is left, whatever the draw: by the smallest top-p, the largest min-p, or nearly no temperature.
    "one token is left": {
        "top_p": cycle(1e-6, 1.0, 1.0),
        "min_p": cycle(0.0, 1.0, 0.0),
        "temperature": cycle(1.0, 1.0, 1e-4),
    },
    "hot": {"temperature": 100.0, "top_k": 50},
}
for name, given in CASES.items():
    add(
        Case(
            op="sample.sample",
            name=name,
            mismatch=0.0 if name in ("greedy", "one token is left") else BOUNDARY,
            run=lambda env, g=given: draw(env, **g),
        )
    )


def ties(env: Env) -> Outputs:
    """Equal logits rank by id: greedy takes the lowest, top-k the lowest k."""
    logits = env.floats(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 3.0]).expand(ROWS, 6).contiguous())
    return sampled(env, logits, make_params(env, ROWS, temperature=cycle(0.0, 1.0), top_k=2))


def below_zero(env: Env, temperature: float) -> Outputs:
    """Every logit is far below zero: a running maximum that begins at zero finds none."""
    logits = env.normal(64, VOCAB, mean=-300.0)
    return sampled(env, logits, make_params(env, 64, temperature=temperature, top_k=5))


def masked(env: Env) -> Outputs:
    """What a grammar leaves: few tokens, one in every third row, all others at -inf."""
    rows = 300
    logits = env.normal(rows, VOCAB, scale=3.0)
    allowed = env.integers(0, VOCAB, rows, 7)
    only = torch.full((rows, VOCAB), -torch.inf, dtype=logits.dtype, device=logits.device)
    allowed[::3] = allowed[::3, :1]
    only = only.scatter(1, allowed.long(), logits.gather(1, allowed.long()))
    given = {"temperature": cycle(0.0, 1.0, rows=rows), "top_k": cycle(VOCAB, 50, 3, rows=rows)}
    filters = {"top_p": cycle(1.0, 0.9, rows=rows), "min_p": cycle(0.0, 0.0, 0.05, rows=rows)}
    return sampled(env, only, make_params(env, rows, **given, **filters), logprobs=True)


def whole_vocab(env: Env) -> Outputs:
    """A vocabulary of a model's size, with the likely tokens at its end."""
    rows = 20
    logits = torch.cat([env.normal(rows, WHOLE_VOCAB - 30_000), env.normal(rows, 30_000, mean=6.0)], dim=-1)
    given = {"temperature": cycle(0.0, 1.0, 0.8, rows=rows), "top_k": cycle(1, 50, 20, rows=rows)}
    return sampled(env, logits, make_params(env, rows, top_p=cycle(1.0, 0.95, rows=rows), **given))


CLOSE = 0.05  # one of 20 rows: sums over so many tokens differ by more
add(Case(op="sample.sample", name="ties", mismatch=BOUNDARY, run=ties))
add(Case(op="sample.sample", name="masked", mismatch=BOUNDARY, run=masked))
add(Case(op="sample.sample", name="a whole vocabulary", mismatch=CLOSE, run=whole_vocab))
for name, temperature in {"greedy": 0.0, "drawn": 1.0}.items():
    add(
        Case(
            op="sample.sample",
            name=f"below zero, {name}",
            mismatch=temperature * CLOSE,
            run=lambda env, t=temperature: below_zero(env, t),
        )
    )


def sample_rows(env: Env, rows: int, vocab: int = 500) -> tuple[Rows, Run]:
    op = env.op("sample.sample", dims={"V": vocab})
    given = {"temperature": cycle(0.0, 1.0, 0.7, rows=rows), "top_p": cycle(0.9, 1.0, rows=rows)}
    params = make_params(env, rows, top_k=cycle(20, vocab, rows=rows), **given)
    names = ("temperature", "top_p", "top_k", "min_p", "seeds", "positions")

    def run(given: Rows) -> Outputs:
        own = SampleParams(**{name: given[name] for name in names})
        ids, logprobs = op(given["logits"], own, logprobs=True)
        return {"ids": ids, "logprobs": logprobs}

    return {"logits": env.normal(rows, vocab, scale=3.0)} | {name: getattr(params, name) for name in names}, run


add_rows(
    "sample.sample",
    sample_rows,
    odd=lambda env, rows: sample_rows(env, rows, 37),
    poisoned=("logits",),
    mismatch=0.2,  # one of five rows
)

DRAWS, CLASSES = 10_000, 24


def distribution(env: Env, *, temperature: float, top_p: float, top_k: int, min_p: float) -> Outputs:
    """Draws from one row of logits, each with a seed and a position of its own, against their probabilities."""
    row = env.normal(CLASSES, scale=1.5).float()
    p = torch.softmax(row.double().cpu() / temperature, -1)
    order = torch.argsort(p, descending=True, stable=True)
    ranked = p[order]
    keep = torch.arange(CLASSES) < top_k
    ranked_k = torch.where(keep, ranked, 0.0) / ranked[keep].sum()
    keep &= (ranked_k.cumsum(0) - ranked_k) < top_p
    keep &= ranked >= min_p * ranked[0]
    kept = torch.zeros(CLASSES, dtype=torch.float64).scatter(0, order, torch.where(keep, ranked, 0.0))
    params = make_params(env, DRAWS, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids = sampled(env, row.expand(DRAWS, CLASSES).contiguous(), params)["ids"]
    problem = check_draws(ids, kept / kept.sum())
    assert problem is None, problem
    return {"drawn": torch.ones(1)}


for name, given in {
    "plain": {},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.15},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 12, "min_p": 0.02},
}.items():
    add(
        Case(
            op="sample.sample",
            name=f"distribution, {name}",
            exact=("drawn",),
            run=lambda env, g=PLAIN | {"top_k": CLASSES} | given: distribution(env, **g),
        )
    )
