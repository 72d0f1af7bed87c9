"""Linear layers, of the shapes of a model of two billion parameters."""

from __future__ import annotations

from functools import partial

from sglang_conformance.cases.quant import FORMATS
from sglang_conformance.perf.load import STEPS, PerfEnv, Work, add, size_of

M, F = 2048, 6144  # hidden size, MLP width


def linear(env: PerfEnv, tokens: int, width: int, out: int, fmt: str) -> Work:
    """x: [T, in] times a weight [out, in]."""
    site = env.site("gemm.linear", fmt=fmt, dims={"in": width, "out": out})
    op = env.op("gemm.linear", fmt=fmt, dims=dict(site.dims))
    weights, stored = env.weights(site, out, width)
    x = env.normal(tokens, width)
    return Work(
        calls=[partial(op, x, w) for w in weights],
        nbytes=stored + size_of(x) + tokens * out * x.element_size(),
        flops=2 * tokens * width * out,
    )


def linear_gated(env: PerfEnv, tokens: int) -> Work:
    """x: [T, M] times gates and up, to [T, F]."""
    site = env.site("gemm.linear_gated", spec="silu", fmt="dense", dims={"in": M, "out": 2 * F, "F": F})
    op = env.op(site.op, spec=site.spec, fmt=site.fmt, dims=dict(site.dims))
    weights, stored = env.weights(site, 2 * F, M)
    x = env.normal(tokens, M)
    return Work(
        calls=[partial(op, x, w, site.spec) for w in weights],
        nbytes=stored + size_of(x) + tokens * F * x.element_size(),
        flops=2 * tokens * M * 2 * F,
    )


SHAPES = {"gate and up": (M, 2 * F), "down": (F, M)}
for fmt in ("dense", *FORMATS):
    for name in SHAPES if fmt == "dense" else ("down",):
        for step, tokens in STEPS.items():
            width, out = SHAPES[name]
            make = partial(linear, tokens=tokens, width=width, out=out, fmt=fmt)
            add("gemm.linear", f"{step}, {name}", make, fmt=fmt)
for step, tokens in STEPS.items():
    add("gemm.linear_gated", step, partial(linear_gated, tokens=tokens), fmt="dense")
