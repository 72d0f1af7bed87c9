"""Calls of ops that look at each row alone, as `op_calls`: norms and activations."""

from __future__ import annotations

from functools import partial

from sglang_core.backend.selection import BoundOp
from sglang_core.bench.op_calls import EPS, TWICE, OpCall, Operands, Step, dtype_of
from sglang_core.ops import OPS


def gated(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """x: [T, 2F]."""
    width, kind = bound.site.dims["F"], bound.site.spec
    xs = [make.normal(step.tokens, 2 * width, dtype=dtype_of(bound)) for _ in range(TWICE)]
    return OpCall(
        title=f"{bound.site.layer} {kind} of {width}, {step.tokens} tokens",
        bound=bound,
        kernel=tuple(partial(bound.fn, x, kind) for x in xs),
        body=tuple(partial(OPS["act.gated"].body, x, kind) for x in xs),
    )


def norm(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """x: [T, M]; of `norm.add_rms`, a residual as well."""
    width, dtype, op = bound.site.dims["M"], dtype_of(bound), bound.site.op
    inputs = 2 if op == "norm.add_rms" else 1
    weight = make.normal(width, dtype=dtype)
    sets = [tuple(make.normal(step.tokens, width, dtype=dtype) for _ in range(inputs)) for _ in range(TWICE)]
    return OpCall(
        title=f"{bound.site.layer} of {width}, {step.tokens} tokens",
        bound=bound,
        kernel=tuple(partial(bound.fn, *xs, weight, EPS) for xs in sets),
        body=tuple(partial(OPS[op].body, *xs, weight, EPS) for xs in sets),
    )
