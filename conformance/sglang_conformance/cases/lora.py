"""Adapters: stacks of low-rank pairs, a pair a token."""

from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, Profile, add, dtype_name
from sglang_conformance.env import Env
from sglang_core.backend.kernel import OpSite
from sglang_core.ops.lora import ExpertAdapters
from sglang_core.ops.moe import ExpertSpec


def stack(env: Env, ranks: tuple[int, ...], rows: int, rank: int, width: int, *, parts: int = 1) -> torch.Tensor:
    """[A, parts * rank, width], of each adapter as many rows a part as its rank says; the rest is zeros."""
    x = env.normal(len(ranks), parts, rank, width, scale=rows**-0.5)
    used = torch.arange(rank)[None, :] < torch.tensor(ranks)[:, None]
    return torch.where(used.to(x.device)[:, None, :, None], x, 0.0).flatten(1, 2)


def scales(env: Env, *shape: int) -> torch.Tensor:
    return env.place(torch.linspace(0.25, 2.0, torch.Size(shape).numel()).view(shape))


def apply(
    env: Env,
    tokens: tuple[int, ...],
    ranks: tuple[int, ...],
    parts: tuple[int, ...],
    *,
    width: int = 128,
) -> Outputs:
    """`tokens`: the adapter of each. Rows of -1 must come back bit for bit."""
    rank, out, num = max(ranks), sum(parts), len(ranks)
    op = env.op("lora.apply", dims={"A": num, "P": len(parts), "R": rank, "in": width, "out": out})
    a = stack(env, ranks, width, rank, width, parts=len(parts))
    b = stack(env, ranks, rank, rank, out).mT.contiguous()
    own = env.place(torch.tensor(tokens, dtype=torch.int32))
    y, x = env.normal(len(tokens), out), env.normal(len(tokens), width)
    got = op(y, x, a, b, own, scales(env, num, len(parts)), parts if len(parts) > 1 else ())
    none = torch.tensor([i for i, adapter in enumerate(tokens) if adapter < 0], dtype=torch.int64, device=got.device)
    return {"y": got, "untouched": got[none]}


APPLY: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Profile]] = {
    "one token": ((2,), (8, 16, 4, 1), (96,), "core"),
    "one token without": ((-1,), (8, 16, 4, 1), (96,), "core"),
    "no tokens": ((), (8, 16), (96,), "core"),
    "decode, mixed": ((0, -1, 2, 1, 2, -1, 3), (8, 16, 4, 1), (96,), "core"),
    "decode, one for all": ((1,) * 9, (8, 16, 4, 1), (96,), "core"),
    "nobody has one": ((-1,) * 9, (8, 16), (96,), "core"),
    "prefill, mixed": ((0,) * 70 + (-1,) * 9 + (3,) * 33 + (1,), (8, 16, 4, 1), (96,), "core"),
    "many adapters": (tuple(range(16)) * 2, (16,) * 16, (128,), "core"),
    "a large rank": ((1, 0, -1), (64, 128), (96,), "core"),
    "query, key and value": ((0, 3, -1, 2) * 3, (8, 16, 4, 1), (64, 32, 32), "core"),
    "gate and up": ((1, -1, 0), (8, 16, 4, 4), (96, 96), "core"),
    "odd sizes": ((0, 1, -1, 1, 0), (3, 5), (33, 7), "odd_sizes"),
}
for name, (tokens, ranks, parts, profile) in APPLY.items():
    add(
        Case(
            op="lora.apply",
            name=name,
            profile=profile,
            exact=("untouched",),
            run=lambda env, t=tokens, r=ranks, p=parts, w=67 if profile == "odd_sizes" else 128: apply(
                env, t, r, p, width=w
            ),
        )
    )


def embed(env: Env, tokens: tuple[int, ...], start: int) -> Outputs:
    """Ids to twice the size of the table, so that some are another rank's."""
    ranks, vocab, hidden = (8, 2, 5), 50, 64
    op = env.op("lora.embed", dims={"A": 3, "R": 8, "V": vocab, "M": hidden})
    a = stack(env, ranks, 8, 8, vocab).mT.contiguous()
    b = stack(env, ranks, 8, 8, hidden).mT.contiguous()
    own = env.place(torch.tensor(tokens, dtype=torch.int32))
    ids, y = env.integers(0, 2 * vocab, len(tokens)), env.normal(len(tokens), hidden)
    return {"y": op(y, ids, a, b, own, scales(env, 3, 1), start)}


for name, tokens in {
    "one token": (1,),
    "no tokens": (),
    "mixed": (0, -1, 2, 1) * 6,
    "nobody has one": (-1,) * 5,
}.items():
    add(Case(op="lora.embed", name=name, run=lambda env, t=tokens: embed(env, t, 0)))
add(Case(op="lora.embed", name="a part", run=lambda env: embed(env, (0, -1, 2, 1) * 6, 25)))


def experts(env: Env, tokens: tuple[int, ...] | None, rows: int, act: ExpertSpec, *, remote: bool = False) -> Outputs:
    """Every expert of every adapter has pairs of its own. tokens None: a batch in which nobody has an adapter."""
    num, k, hidden, width, ranks = 6, 2, 64, 48, (4, 2, 3)
    rank, count = max(ranks), len(ranks)
    dims = {"X": num, "K": k, "M": hidden, "F": width}
    at = OpSite(op="lora.experts", layer="Conformance", dtype=dtype_name(env.dtype), fmt="dense", spec=act, dims=dims)
    op = env.op("lora.experts", fmt="dense", spec=act, dims=dims)
    w13, w2 = env.experts(num, 2 * width, hidden, at), env.experts(num, hidden, width, at)
    adapters = ExpertAdapters(
        a13=env.normal(count, num, 2 * rank, hidden, scale=hidden**-0.5),
        b13=env.normal(count, num, 2 * width, rank, scale=rank**-0.5),
        a2=env.normal(count, num, rank, width, scale=width**-0.5),
        b2=env.normal(count, num, hidden, rank, scale=rank**-0.5),
        scale=scales(env, count, num, 3),
    )
    ids = torch.stack([env.permutation(num)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
    weights = env.place(torch.rand(rows, k, generator=torch.Generator().manual_seed(rows)) + 0.1)
    own = None if tokens is None else env.place(torch.tensor(tokens, dtype=torch.int32))
    more: dict[str, torch.Tensor] = {}
    if remote:
        more["expert_map"] = env.place(torch.tensor([0, -1, 2, 3, -1, 5], dtype=torch.int32))
    if act.activation == "swiglu_clamped":  # those that are clamped have biases, too
        more |= {"bias13": env.normal(num, 2 * width), "bias2": env.normal(num, hidden)}
    x = env.normal(rows, hidden, scale=0.2)
    return {"y": op(x, w13, w2, weights, env.place(ids.int()), act, adapters, own, **more)}


MIXED = (0, -1, 2, 1, 1, -1, 0)
EXPERTS: dict[str, tuple[tuple[int, ...] | None, int, ExpertSpec, bool]] = {
    "one token": ((2,), 1, ExpertSpec(), False),
    "no tokens": ((), 0, ExpertSpec(), False),
    "mixed": (MIXED, 7, ExpertSpec(), False),
    "nobody has one": (None, 7, ExpertSpec(), False),
    "prefill": (MIXED * 10, 70, ExpertSpec(), False),
    "clamped, biased": (MIXED, 7, ExpertSpec(activation="swiglu_clamped"), False),
    "weight on the input": (MIXED, 7, ExpertSpec(weight_on_input=True), False),
    "remote experts": (MIXED * 2, 14, ExpertSpec(), True),
}
for name, (own, rows, act, remote) in EXPERTS.items():
    add(
        Case(
            op="lora.experts",
            name=name,
            fmt="dense",
            run=lambda env, t=own, n=rows, a=act, r=remote: experts(env, t, n, a, remote=r),
        )
    )
