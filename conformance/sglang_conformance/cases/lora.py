"""Adapters: stacks of low-rank pairs, a pair a token."""

from __future__ import annotations

import torch

from sglang_conformance.case import HALVES, Case, Outputs, Profile, add, dtype_name
from sglang_conformance.cases.moe import token_experts
from sglang_conformance.cases.rows import Rows, Run, add_rows
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
    "one token without": ((-1,), (8, 16, 4, 1), (96,), "core"),
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


def of_rows(env: Env, rows: int, num: int) -> torch.Tensor:
    """The adapter of each row, some without."""
    return env.integers(-1, num, rows)


def apply_rows(env: Env, rows: int, width: int = 128, parts: tuple[int, ...] = (64, 32, 32)) -> tuple[Rows, Run]:
    ranks, rank, out = (8, 16, 4, 1), 16, sum(parts)
    op = env.op("lora.apply", dims={"A": 4, "P": len(parts), "R": rank, "in": width, "out": out})
    a = stack(env, ranks, width, rank, width, parts=len(parts))
    b = stack(env, ranks, rank, rank, out).mT.contiguous()
    given = {"y": env.normal(rows, out), "x": env.normal(rows, width), "own": of_rows(env, rows, 4)}
    scale = scales(env, 4, len(parts))
    return given, lambda given: {"y": op(given["y"], given["x"], a, b, given["own"], scale, parts)}


def far_adapters(env: Env) -> Outputs:
    """Adapters whose places do not fit 32 bits; all but the last ones are zeros."""
    rank, width, last = 64, 8192, 4
    num = env.far(2**31 // (rank * width)) + last
    a, b = env.vast(num, rank, width), env.vast(num, 64, rank)
    a[-last:], b[-last:] = env.normal(last, rank, width, scale=width**-0.5), env.normal(last, 64, rank, scale=0.125)
    op = env.op("lora.apply", dims={"A": num, "P": 1, "R": rank, "in": width, "out": 64})
    own = env.place(torch.tensor([num - 1, num - 3], dtype=torch.int32))
    scale = env.place(torch.full((num, 1), 0.5))
    return {"y": op(env.normal(2, 64), env.normal(2, width), a, b, own, scale, ())}


add(Case(op="lora.apply", name="adapters past 2^31 elements", dtypes=HALVES, full=True, run=far_adapters))
add_rows(
    "lora.apply",
    apply_rows,
    odd=lambda env, rows: apply_rows(env, rows, 67, (33, 7)),
    many=lambda env, rows: apply_rows(env, rows, 16, (8,)),
    poisoned=("y", "x"),
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


for name, tokens in {"mixed": (0, -1, 2, 1) * 6, "nobody has one": (-1,) * 5}.items():
    add(Case(op="lora.embed", name=name, run=lambda env, t=tokens: embed(env, t, 0)))
add(Case(op="lora.embed", name="a part", run=lambda env: embed(env, (0, -1, 2, 1) * 6, 25)))


def embed_rows(env: Env, rows: int, hidden: int = 64) -> tuple[Rows, Run]:
    ranks, vocab = (8, 2, 5), 50
    op = env.op("lora.embed", dims={"A": 3, "R": 8, "V": vocab, "M": hidden})
    a = stack(env, ranks, 8, 8, vocab).mT.contiguous()
    b = stack(env, ranks, 8, 8, hidden).mT.contiguous()
    given = {"y": env.normal(rows, hidden), "ids": env.integers(0, 2 * vocab, rows), "own": of_rows(env, rows, 3)}
    scale = scales(env, 3, 1)
    return given, lambda given: {"y": op(given["y"], given["ids"], a, b, given["own"], scale, 0)}


add_rows("lora.embed", embed_rows, odd=lambda env, rows: embed_rows(env, rows, 37), poisoned=("y",))


def experts(env: Env, tokens: tuple[int, ...] | None, rows: int, act: ExpertSpec, *, remote: bool = False) -> Outputs:
    """tokens None: a batch in which nobody has an adapter."""
    given, run = expert_rows(env, rows, act, remote=remote)
    own = None if tokens is None else env.place(torch.tensor(tokens, dtype=torch.int32))
    return run(given | {"own": own})  # type: ignore[dict-item]


def expert_rows(
    env: Env, rows: int, act: ExpertSpec | None = None, *, hidden: int = 64, width: int = 48, remote: bool = False
) -> tuple[Rows, Run]:
    """Every expert of every adapter has pairs of its own."""
    act = act or ExpertSpec()
    num, k, ranks = 6, 2, (4, 2, 3)
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
    more: dict[str, torch.Tensor] = {}
    if remote:
        more["expert_map"] = env.place(torch.tensor([0, -1, 2, 3, -1, 5], dtype=torch.int32))
    if act.activation == "swiglu_clamped":  # those that are clamped have biases, too
        more |= {"bias13": env.normal(num, 2 * width), "bias2": env.normal(num, hidden)}

    def run(given: Rows) -> Outputs:
        x, weights, ids, own = (given[name] for name in ("x", "weights", "ids", "own"))
        return {"y": op(x, w13, w2, weights, ids, act, adapters, own, **more)}

    chosen = token_experts(env, rows, num, k)
    return {"x": env.normal(rows, hidden, scale=0.2), "own": of_rows(env, rows, count)} | chosen, run


MIXED = (0, -1, 2, 1, 1, -1, 0)
EXPERTS: dict[str, tuple[tuple[int, ...] | None, int, ExpertSpec, bool]] = {
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
add_rows(
    "lora.experts",
    lambda env, rows: expert_rows(env, rows, ExpertSpec(activation="swiglu_clamped")),
    odd=lambda env, rows: expert_rows(env, rows, hidden=37, width=21),
    fmt="dense",
)
