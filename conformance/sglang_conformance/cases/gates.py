"""The gates of the gated delta rule, of projections that lie as a layer has them."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env, Op

OP = "ssm.gates"


def given(env: Env, key_heads: int, group: int) -> tuple[Op, Tensor, Tensor]:
    """The op and what a layer has for it: decays of any speed, biases of either sign, in float32 whatever the case's dtype."""
    heads = key_heads * group
    op = env.op(OP, dims={"Hk": key_heads, "Hv": heads})
    speed, bias = torch.rand(2, heads, generator=torch.Generator().manual_seed(heads))
    return op, env.place(-4 * speed - 1e-3), env.place(4 * bias - 2)


def outputs(g: Tensor, beta: Tensor) -> Outputs:
    return {"g": g, "beta": beta}


def gates_rows(env: Env, rows: int, key_heads: int = 4, group: int = 16) -> tuple[Rows, Run]:
    op, rate, dt_bias = given(env, key_heads, group)

    def run(x: Rows) -> Outputs:
        return outputs(*op(x["b"], x["a"], rate, dt_bias))

    return {name: env.normal(rows, key_heads, group, scale=2.0) for name in ("b", "a")}, run


def by_key_head(env: Env, rows: int, key_heads: int, group: int, *, scale: float = 2.0, mean: float = 0.0) -> Outputs:
    """One projection has both, by key head: each begins and steps at places that are multiples of little."""
    op, rate, dt_bias = given(env, key_heads, group)
    b, a = env.normal(rows, key_heads, 2, group, scale=scale, mean=mean).unbind(2)
    return outputs(*op(b, a, rate, dt_bias))


for name, sizes in {"decode": (4, 16, 2), "prefill": (130, 16, 2), "one value head a key head": (5, 8, 1)}.items():
    add(Case(op=OP, name=f"by key head, {name}", run=lambda env, sizes=sizes: by_key_head(env, *sizes)))
add(Case(op=OP, name="by key head, odd sizes", run=lambda env: by_key_head(env, 7, 3, 5), profile="odd_sizes"))
# A softplus is its argument here, or 1 + exp of it overflows.
add(Case(op=OP, name="large gates", run=lambda env: by_key_head(env, 6, 4, 4, scale=60.0)))
# Where 1 + exp(a) has lost the digits of exp(a), decays are slow and not none.
add(Case(op=OP, name="slow decays", run=lambda env: by_key_head(env, 6, 4, 4, scale=1.0, mean=-14.0)))
add_rows(
    OP,
    gates_rows,
    odd=lambda env, rows: gates_rows(env, rows, 3, 5),
    many=lambda env, rows: gates_rows(env, rows, 1, 2),
    poisoned=("b", "a"),
)
