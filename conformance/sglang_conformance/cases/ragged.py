"""Attention without a cache, and the merging of two halves."""

from __future__ import annotations

import torch

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.attention import spec_of
from sglang_conformance.cases.kv_step import Reqs, new_kv
from sglang_conformance.cases.rows import PADDED, TOGETHER, Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_conformance.guard import same_bits
from sglang_core.ops.attention import AttnSpec, RaggedBatch

SQUARE: Reqs = [(40, 40), (1, 1), (150, 150)]  # (queries, keys) each


class Ragged:
    """The op, bound, and inputs of its own for some reqs."""

    def __init__(self, env: Env, lens: Reqs, spec: AttnSpec, *, strides: int = 0) -> None:
        self.env, self.lens, self.spec = env, lens, spec
        dims = {"Hq": spec.num_heads, "Hk": spec.num_kv_heads, "D": spec.head_dim}
        self.op = env.op("attn.ragged", spec=spec, dims=dims)
        num_q, num_k = (sum(n) for n in zip(*lens, strict=True))
        inputs = env.normal(num_q, spec.num_heads, spec.head_dim), *new_kv(env, spec, num_k)
        self.q, self.k, self.v = (env.sliced(x, strides) if strides else x for x in inputs)

    def __call__(self, reqs: slice = slice(None), *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of the reqs. `padding`: queries of no req, all NaN, that come last."""
        lens = self.lens[reqs]
        before = self.lens[: reqs.start or 0]
        rows = [slice(sum(n[i] for n in before), sum(n[i] for n in before) + sum(n[i] for n in lens)) for i in (0, 1)]
        q = self.q[rows[0]]
        if padding:
            q = torch.cat([q, torch.full_like(q[:1], float("nan")).expand(padding, *q.shape[1:])])
        batch = RaggedBatch.of([n for n, _ in lens], [n for _, n in lens], self.env.device)
        return self.op(q, self.k[rows[1]], self.v[rows[1]], batch, self.spec, lse=True)  # type: ignore[no-any-return]


def ragged(env: Env, lens: Reqs, spec: AttnSpec, *, strides: int = 0) -> Outputs:
    o, lse = Ragged(env, lens, spec, strides=strides)()
    return {"o": o, "lse": lse}


def alone_and_together(env: Env) -> Outputs:
    run = Ragged(env, SQUARE, spec_of())
    together = run()[0]
    alone = torch.cat([run(slice(r, r + 1))[0] for r in range(len(SQUARE))])
    if env.batch_invariant("attn.ragged"):
        assert same_bits(together, alone), "it says batch_invariant, and a req's neighbours change its bits"
    return {"together": together, "alone": alone}


def padded_or_not(env: Env) -> Outputs:
    """Queries past the last req's give zeros, and change nobody's bits."""
    run = Ragged(env, SQUARE, spec_of())
    (plain, lse), (padded, padded_lse) = run(), run(padding=4)
    if env.batch_invariant("attn.ragged"):
        assert same_bits(plain, padded[: len(plain)]), "it says batch_invariant, and padding changes bits"
    return {"o": plain, "lse": lse, "o, padded": padded, "lse, padded": padded_lse}


def add_ragged(
    name: str, lens: Reqs, spec: AttnSpec, *, profile: Profile = "core", strides: int = 0, full: bool = False
) -> None:
    add(
        Case(
            op="attn.ragged",
            name=name,
            profile=profile,
            full=full,
            run=lambda env: ragged(env, lens, spec, strides=strides),
        )
    )


add_ragged("encoder", SQUARE, spec_of(causal=False))
add_ragged("causal", SQUARE, spec_of())
add_ragged("one token", [(1, 1)], spec_of())
add_ragged("no tokens", [(0, 0), (0, 0)], spec_of())
add_ragged("more keys than queries", [(5, 40), (64, 65)], spec_of())
# The first queries then see no key: zeros, and an lse of -inf.
add_ragged("more queries than keys", [(40, 5), (65, 64)], spec_of())
add_ragged("an empty req", [(5, 5), (0, 0), (3, 3)], spec_of())
add_ragged("queries without keys", [(5, 5), (4, 0), (3, 3)], spec_of(causal=False))
add_ragged("large scores", SQUARE, spec_of(scale=20.0))
add_ragged("window", SQUARE, spec_of(window=9), profile="window")
add_ragged("window, more keys than queries", [(5, 40), (64, 70)], spec_of(window=9), profile="window")
add_ragged("window of the length of a req", [(32, 32), (33, 33), (31, 31)], spec_of(window=32), profile="window")
add_ragged("soft cap", SQUARE, spec_of(soft_cap=2.0), profile="soft_cap")
for dim in (72, 80, 96, 128, 192, 256):
    add_ragged(f"head dim {dim}", SQUARE, spec_of(4, 4, dim, causal=False))
add_ragged("values narrower than keys", SQUARE, spec_of(4, 4, 192, v_head_dim=128))  # of latents, expanded
for heads, kv_heads in ((2, 2), (6, 2), (8, 1)):
    add_ragged(f"{heads} to {kv_heads} heads", SQUARE, spec_of(heads, kv_heads))
add_ragged("odd head dims", SQUARE, spec_of(6, 3, 24, v_head_dim=40), profile="odd_sizes")
add_ragged("sliced", SQUARE, spec_of(), strides=16)
add_ragged("sliced at odd places", SQUARE, spec_of(), strides=3, profile="odd_sizes")
add_ragged("8191 keys", [(3, 8191), (1, 4000)], spec_of(4, 2, scale=0.2), full=True)
add(Case(op="attn.ragged", name=TOGETHER, run=alone_and_together))
add(Case(op="attn.ragged", name=PADDED, run=padded_or_not, profile="buckets"))


def merge(env: Env) -> Outputs:
    """Rows 0..2 have an empty side, or two; an empty side's values are NaN."""
    shape = (12, 8, 64)
    o_a, o_b = env.normal(*shape), env.normal(*shape)
    lse_a, lse_b = (env.place(10 * env.normal(12, 8).float().cpu()) for _ in range(2))
    empty_a = env.place(torch.tensor([True, False, True] + [False] * 9))[:, None]
    empty_b = env.place(torch.tensor([False, True, True] + [False] * 9))[:, None]
    o, lse = env.op("attn.merge", dims={"Hq": 8, "D": 64})(
        torch.where(empty_a[..., None], torch.nan, o_a),
        torch.where(empty_a, -torch.inf, lse_a),
        torch.where(empty_b[..., None], torch.nan, o_b),
        torch.where(empty_b, -torch.inf, lse_b),
    )
    return {"o": o, "lse": lse}


def merge_rows(env: Env, rows: int, *, dim: int = 64, scale: float = 10.0) -> tuple[Rows, Run]:
    op = env.op("attn.merge", dims={"Hq": 8, "D": dim})
    halves = {f"o_{side}": env.normal(rows, 8, dim) for side in "ab"}
    sums = {f"lse_{side}": env.place(scale * env.normal(rows, 8).float().cpu()) for side in "ab"}

    def run(given: Rows) -> Outputs:
        o, lse = op(given["o_a"], given["lse_a"], given["o_b"], given["lse_b"])
        return {"o": o, "lse": lse}

    return halves | sums, run


add(Case(op="attn.merge", name="halves and empty sides", run=merge))
# Each side's exponential alone overflows float32, or vanishes.
add(
    Case(
        op="attn.merge",
        name="large sums",
        run=lambda env: (made := merge_rows(env, 9, scale=300.0))[1](made[0]),
    )
)
add_rows(
    "attn.merge",
    merge_rows,
    odd=lambda env, rows: merge_rows(env, rows, dim=37),
    poisoned=("o_a", "lse_a", "o_b", "lse_b"),
    strided=("o_a", "o_b"),
)
