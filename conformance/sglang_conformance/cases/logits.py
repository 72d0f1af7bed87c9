from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.env import Env

FLOAT32 = (torch.float32,)  # what a head gives


def mask(env: Env, vocab: int) -> Outputs:
    op = env.op("logits.mask", dims={"V": vocab})
    words = env.integers(-(2**31), 2**31 - 1, 6, -(-vocab // 32))
    return {"logits": op(env.normal(6, vocab), words)}


def adjust(env: Env) -> Outputs:
    """Some entries forbid, some divide, some multiply; padding names an entry in use."""
    op = env.op("logits.adjust", dims={"V": 500})
    ids = env.permutation(500)[:40]
    rows = torch.arange(40, dtype=torch.int32) % 6
    repetition, add_ = torch.linspace(0.5, 2.0, 40), torch.linspace(-3.0, 3.0, 40)
    repetition[0], add_[0] = 1.0, -torch.inf
    pad = torch.zeros(8, dtype=torch.int32)
    return {
        "logits": op(
            env.normal(6, 500, scale=4.0),
            env.place(torch.cat([rows, pad + rows[1]])),
            env.place(torch.cat([ids, pad + ids[1]])),
            env.place(torch.cat([repetition, pad + 1.0])),
            env.place(torch.cat([add_, pad + 0.0])),
        )
    }


def soft_cap(env: Env) -> Outputs:
    op = env.op("logits.soft_cap", dims={"V": 500})
    return {"logits": op(env.normal(6, 500, scale=20.0), 30.0)}


add(Case(op="logits.mask", name="whole words", dtypes=FLOAT32, exact=("logits",), run=lambda env: mask(env, 512)))
add(Case(op="logits.mask", name="last word in part", dtypes=FLOAT32, exact=("logits",), run=lambda env: mask(env, 517)))
add(Case(op="logits.adjust", name="entries", dtypes=FLOAT32, run=adjust))
add(Case(op="logits.soft_cap", name="30", run=soft_cap))
