"""What happens to logits between the head and the sampler."""

from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.cases.sampling import WHOLE_VOCAB
from sglang_conformance.env import Env


def mask_rows(env: Env, rows: int, vocab: int = 512) -> tuple[Rows, Run]:
    op = env.op("logits.mask", dims={"V": vocab})
    words = env.integers(-(2**31), 2**31 - 1, rows, -(-vocab // 32))
    given = {"logits": env.normal(rows, vocab), "words": words}
    return given, lambda rows: {"logits": op(rows["logits"], rows["words"])}


def mask(env: Env, vocab: int) -> Outputs:
    """One row allows nothing, one everything; and there are logits that are infinite already."""
    rows, run = mask_rows(env, 6, vocab)
    rows["words"][1], rows["words"][2] = 0, -1
    rows["logits"][:, 3], rows["logits"][:, 5] = -torch.inf, torch.inf
    return run(rows)


def adjust(env: Env) -> Outputs:
    """Some entries forbid, some divide, some multiply; padding names an entry in use, and one that is forbidden."""
    op = env.op("logits.adjust", dims={"V": 500})
    ids = env.permutation(500)[:40]
    rows = torch.arange(40, dtype=torch.int32) % 6
    repetition, add_ = torch.linspace(0.5, 2.0, 40), torch.linspace(-3.0, 3.0, 40)
    repetition[0], add_[0] = 1.0, -torch.inf
    named = torch.tensor([1] * 8 + [0] * 3)
    pad = torch.zeros(11)
    return {
        "logits": op(
            env.normal(6, 500, scale=4.0),
            env.place(torch.cat([rows, rows[named]])),
            env.place(torch.cat([ids, ids[named]])),
            env.place(torch.cat([repetition, pad + 1.0])),
            env.place(torch.cat([add_, pad])),
        )
    }


def adjust_rows(env: Env, rows: int, vocab: int = 300) -> tuple[Rows, Run]:
    """An entry a row."""
    op = env.op("logits.adjust", dims={"V": vocab})

    def run(given: Rows) -> Outputs:
        row = torch.arange(len(given["ids"]), dtype=torch.int32, device=env.device)
        return {"logits": op(given["logits"], row, given["ids"], given["repetition"], given["add"])}

    given = {
        "logits": env.normal(rows, vocab, scale=4.0),
        "ids": env.integers(0, vocab, rows),
        "repetition": env.place(torch.linspace(0.5, 2.0, rows)),
        "add": env.place(torch.linspace(-3.0, 3.0, rows)),
    }
    return given, run


def no_entries(env: Env) -> Outputs:
    op, none = env.op("logits.adjust", dims={"V": 300}), torch.zeros(0)
    ids = env.place(none.int())
    return {"logits": op(env.normal(6, 300), ids, ids, env.place(none), env.place(none))}


def soft_cap_rows(env: Env, rows: int, vocab: int = 500, scale: float = 20.0) -> tuple[Rows, Run]:
    op = env.op("logits.soft_cap", dims={"V": vocab})
    return {"logits": env.normal(rows, vocab, scale=scale)}, lambda given: {"logits": op(given["logits"], 30.0)}


def soft_cap(env: Env, scale: float) -> Outputs:
    rows, run = soft_cap_rows(env, 6, scale=scale)
    return run(rows)


EXACT = ("logits",)
add(Case(op="logits.mask", name="whole words", exact=EXACT, run=lambda env: mask(env, 512)))
add(Case(op="logits.mask", name="last word in part", exact=EXACT, run=lambda env: mask(env, 517)))
add(Case(op="logits.mask", name="a whole vocabulary", exact=EXACT, run=lambda env: mask(env, WHOLE_VOCAB)))
add(Case(op="logits.adjust", name="entries", run=adjust))
add(Case(op="logits.adjust", name="no entries", run=no_entries))
add(Case(op="logits.soft_cap", name="30", run=lambda env: soft_cap(env, 20.0)))
add(Case(op="logits.soft_cap", name="30, large logits", run=lambda env: soft_cap(env, 5000.0)))
add_rows(
    "logits.mask", mask_rows, odd=lambda env, rows: mask_rows(env, rows, 37), poisoned=("logits",), exact=("logits",)
)
add_rows("logits.adjust", adjust_rows, odd=lambda env, rows: adjust_rows(env, rows, 37), poisoned=("logits",))
add_rows("logits.soft_cap", soft_cap_rows, odd=lambda env, rows: soft_cap_rows(env, rows, 37), poisoned=("logits",))
