"""Draws are defined to the bit of the hash; what may differ is a row whose number falls on a boundary by rounding."""

from __future__ import annotations

from typing import Any

import torch

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.env import Env
from sglang_core.ops.sampling import SampleParams

FLOAT32 = (torch.float32,)
ROWS, VOCAB = 600, 1000
BOUNDARY = 0.005  # of the rows: 1000 sums of float32 differ by 1e-6 of the mass or so


def draw(env: Env, *, static: dict[str, Any] | None = None, logprobs: bool = False, **given: Any) -> Outputs:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": VOCAB, "min_p": 0.0}
    floats = {
        name: torch.as_tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32).expand(ROWS).contiguous()
        for name, value in (fields | given).items()
    }
    logits = env.normal(ROWS, VOCAB, scale=3.0)
    params = SampleParams(
        **{name: x.to(env.device) for name, x in floats.items()},  # float32 in the oracle too
        seeds=env.integers(-(2**31), 2**31 - 1, ROWS),
        positions=env.integers(0, 100_000, ROWS),
        **(static or {}),
    )
    ids, found = env.op("sample.sample", dims={"V": VOCAB})(logits, params, logprobs=logprobs)
    return {"ids": ids} if found is None else {"ids": ids, "logprobs": found}


def cycle(*values: float) -> torch.Tensor:
    """The values over and over, one a row."""
    return torch.tensor(values).repeat(-(-ROWS // len(values)))[:ROWS]


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
}
for name, given in CASES.items():
    add(
        Case(
            op="sample.sample",
            name=name,
            dtypes=FLOAT32,
            mismatch=0.0 if name == "greedy" else BOUNDARY,
            run=lambda env, g=given: draw(env, **g),
        )
    )


def ties(env: Env) -> Outputs:
    """Equal logits rank by id: greedy takes the lowest, top-k the lowest k."""
    logits = env.floats(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 3.0]).expand(ROWS, 6).contiguous())
    params = SampleParams(
        temperature=cycle(0.0, 1.0).to(env.device),
        top_p=cycle(1.0).to(env.device),
        top_k=cycle(2).to(torch.int32).to(env.device),
        min_p=cycle(0.0).to(env.device),
        seeds=env.integers(0, 2**31 - 1, ROWS),
        positions=env.integers(0, 1000, ROWS),
    )
    return {"ids": env.op("sample.sample", dims={"V": 6})(logits, params)[0]}


add(Case(op="sample.sample", name="ties", dtypes=FLOAT32, mismatch=BOUNDARY, run=ties))
