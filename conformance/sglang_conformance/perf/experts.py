"""Mixture of experts: of the weights, those of the experts that some token goes to."""

from __future__ import annotations

from functools import partial

import torch

from sglang_conformance.perf.load import STEPS, PerfEnv, Work, add, size_of
from sglang_core.ops.moe import ExpertSpec, RouteSpec

X, K, M, F = 32, 4, 1024, 512
ROUTE = RouteSpec(num_experts=128, top_k=8, renormalize=True)
ACT = ExpertSpec()


def route(env: PerfEnv, tokens: int) -> Work:
    """Reads logits, writes a weight and an id for each expert chosen."""
    op = env.op("moe.route", spec=ROUTE, dims={"X": ROUTE.num_experts, "K": ROUTE.top_k})
    logits = env.tensors(tokens, ROUTE.num_experts, copies=64)
    return Work(
        calls=[partial(op, x, ROUTE, None) for x in logits], nbytes=size_of(logits[0]) + tokens * ROUTE.top_k * 8
    )


def fused(env: PerfEnv, tokens: int) -> Work:
    dims = {"X": X, "K": K, "M": M, "F": F}
    site = env.site("moe.fused", fmt="dense", spec=ACT, dims=dims)
    op = env.op("moe.fused", fmt="dense", spec=ACT, dims=dims)
    x = env.normal(tokens, M)
    expert = 3 * F * M * x.element_size()
    pairs = zip(env.weights(site, X, 2 * F, M).copies, env.weights(site, X, M, F).copies)
    ids_cpu = torch.stack([env.permutation(X)[:K] for _ in range(tokens)])
    ids, weights = env.place(ids_cpu), env.place(torch.full((tokens, K), 1 / K))
    return Work(
        calls=[partial(op, x, w13, w2, weights, ids, ACT) for w13, w2 in pairs],
        nbytes=len(set(ids_cpu.flatten().tolist())) * expert + 2 * size_of(x),
        flops=tokens * K * 6 * F * M,
    )


def grouped(env: PerfEnv, tokens: int) -> Work:
    """As many rows for each expert as the others, as far as they go round."""
    dims = {"X": X, "in": M, "out": 2 * F}
    site = env.site("gemm.grouped", fmt="dense", dims=dims)
    op = env.op("gemm.grouped", fmt="dense", dims=dims)
    rows = tokens * K
    sizes = torch.tensor([rows // X + (i < rows % X) for i in range(X)], dtype=torch.int32)
    x = env.normal(rows, M)
    expert = 2 * F * M * x.element_size()
    weights = env.weights(site, X, 2 * F, M).copies
    return Work(
        calls=[partial(op, x, w, env.place(sizes)) for w in weights],
        nbytes=int((sizes > 0).sum()) * expert + size_of(x) + rows * 2 * F * x.element_size(),
        flops=2 * rows * 2 * F * M,
    )


for step, tokens in STEPS.items():
    add("moe.route", step, partial(route, tokens=tokens))
for step, tokens in STEPS.items():
    add("moe.fused", step, partial(fused, tokens=tokens), fmt="dense")
for step, tokens in STEPS.items():
    add("gemm.grouped", step, partial(grouped, tokens=tokens), fmt="dense")
