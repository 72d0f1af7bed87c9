"""Recurrent ops over a pool of states that is full of NaN but for the states that live in it, in slots of random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.env import Env
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch

LAYER, NUM_LAYERS = 1, 2
Reqs = list[tuple[bool, int]]  # (has a state, extend) each

DECODE: Reqs = [(True, 1)] * 5
FIRST: Reqs = [(False, 1)] * 3
PREFILL: Reqs = [(False, 70), (False, 9), (False, 64)]
CHUNK: Reqs = [(True, 65), (True, 2), (True, 128)]
MIXED: Reqs = [(True, 1), (False, 33), (True, 150), (False, 1), (True, 1), (True, 3)]


def spec_of(k_heads: int = 2, v_heads: int = 4, k_dim: int = 32, v_dim: int = 32, **more: Any) -> GatedDeltaSpec:
    facts = {"conv_width": 4, "scale": k_dim**-0.5} | more
    return GatedDeltaSpec(num_k_heads=k_heads, num_v_heads=v_heads, k_head_dim=k_dim, v_head_dim=v_dim, **facts)


@dataclass(kw_only=True)
class Step:
    """A batch in host integers, and the pool with the state of every req that has one."""

    batch: StateBatch
    pool: StatePool


def make_step(env: Env, spec: GatedDeltaSpec, reqs: Reqs, *, padding: int = 0, in_place: bool = False) -> Step:
    """`padding` more reqs and tokens than there are, as in a bucket. `in_place`: a state is written where it was read."""
    count = len(reqs)
    slots = env.permutation(2 * count) + 1
    started = torch.tensor([has_state for has_state, _ in reqs])
    read = torch.where(started, slots[:count], 0)
    write = torch.where(started, slots[:count], slots[count:]) if in_place else slots[count:]
    pool_spec = StatePoolSpec(
        num_layers=NUM_LAYERS,
        conv_shape=(spec.conv_width - 1, spec.conv_dim),
        conv_dtype=env.dtype,
        state_shape=(spec.num_v_heads, spec.k_head_dim, spec.v_head_dim),
    )
    pool = env.state_pool(pool_spec, 2 * count + 1)
    conv, state = env.normal(count, *pool_spec.conv_shape), float32(env, count, *pool_spec.state_shape)
    # Reqs without a state write theirs to scratch.
    pool.scatter(LAYER, env.place(read), conv, state)
    pool.poison([0])
    extends = torch.tensor([0] + [extend for _, extend in reqs] + [0] * padding)
    none = torch.zeros(padding, dtype=torch.int32)
    batch = StateBatch(
        cu_extend_cpu=extends.cumsum(0).to(torch.int32),
        read_slots_cpu=torch.cat([read, none]),
        write_slots_cpu=torch.cat([write, none]),
        num_tokens=int(extends.sum()) + padding,
        num_reqs=count + padding,
        max_extend=int(extends.max()),
        static=padding > 0,
    )
    return Step(batch=batch, pool=pool)


def float32(env: Env, *shape: int) -> Tensor:
    """Normal numbers in float32, whatever the case's dtype."""
    return env.place(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


def delta(
    env: Env,
    reqs: Reqs,
    spec: GatedDeltaSpec | None = None,
    *,
    decay: float = 0.3,
    padding: int = 0,
    in_place: bool = False,
) -> Outputs:
    """`decay`: the mean of -g."""
    spec = spec or spec_of()
    ops = env.state_ops(spec)
    step = make_step(env, spec, reqs, padding=padding, in_place=in_place)
    plan = ops["ssm.plan"](spec, step.batch, env.device)
    tokens = step.batch.num_tokens
    q, k = (env.normal(tokens, spec.num_k_heads, spec.k_head_dim, scale=spec.k_head_dim**-0.5) for _ in range(2))
    v = env.normal(tokens, spec.num_v_heads, spec.v_head_dim)
    random = torch.Generator().manual_seed(tokens)
    g, beta = torch.rand(2, tokens, spec.num_v_heads, generator=random)
    args = (q, k, v, env.place(g * -2 * decay), env.place(beta), step.pool, LAYER, spec, plan)
    first = ops["ssm.gated_delta_rule"](*args)
    again = first if in_place else ops["ssm.gated_delta_rule"](*args)  # reads what it read before
    states = step.pool.gather(LAYER, env.place(torch.arange(1, step.pool.num_slots).int()))[1]
    return {"o": first, "o, again": again, "state": states}


def conv(
    env: Env,
    reqs: Reqs,
    spec: GatedDeltaSpec | None = None,
    *,
    bias: bool = False,
    silu: bool = True,
    padding: int = 0,
    in_place: bool = False,
) -> Outputs:
    spec = spec or spec_of()
    ops = env.state_ops(spec)
    step = make_step(env, spec, reqs, padding=padding, in_place=in_place)
    plan = ops["ssm.plan"](spec, step.batch, env.device)
    x, weight = env.normal(step.batch.num_tokens, spec.conv_dim), env.normal(spec.conv_dim, spec.conv_width)
    b = env.normal(spec.conv_dim) if bias else None
    y = ops["ssm.causal_conv1d"](x, weight, b, step.pool, LAYER, plan, activation="silu" if silu else None)
    return {"y": y, "conv": step.pool.gather(LAYER, env.place(torch.arange(1, step.pool.num_slots).int()))[0]}


STEPS: dict[str, tuple[Reqs, Profile, dict[str, Any]]] = {
    "decode": (DECODE, "core", {}),
    "decode in place": (DECODE, "core", {"in_place": True}),
    "first tokens": (FIRST, "core", {}),
    "prefill": (PREFILL, "core", {}),
    "chunked prefill": (CHUNK, "core", {}),
    "mixed": (MIXED, "core", {}),
    "mixed in place": (MIXED, "core", {"in_place": True}),
    "128 dims": ([(True, 1), (False, 80)], "core", {"spec": spec_of(1, 2, 128, 128)}),
    "as many key heads as value heads": (MIXED, "core", {"spec": spec_of(4, 4)}),
    "odd sizes": (MIXED, "odd_sizes", {"spec": spec_of(1, 3, 24, 20)}),
    "padded decode": (DECODE, "buckets", {"padding": 3}),
    "padded mixed": (MIXED, "buckets", {"padding": 5}),
}
DELTAS: dict[str, tuple[Reqs, Profile, dict[str, Any]]] = {
    "no decay": (MIXED, "core", {"decay": 0.0}),
    # Running products of decays underflow within a chunk, and their inverses overflow.
    "all decays": (MIXED, "core", {"decay": 20.0}),
    "keys of any length": ([(True, 1), (False, 40)], "core", {"spec": spec_of(qk_l2norm=False)}),
}
CONVS: dict[str, tuple[Reqs, Profile, dict[str, Any]]] = {
    "bias": (MIXED, "core", {"bias": True}),
    "no activation": (MIXED, "core", {"silu": False}),
    "two taps": (MIXED, "core", {"spec": spec_of(conv_width=2)}),
    "seven taps": (MIXED, "core", {"spec": spec_of(conv_width=7), "bias": True}),
}
for name, (reqs, profile, more) in (STEPS | DELTAS).items():
    add(
        Case(
            op="ssm.gated_delta_rule",
            name=name,
            profile=profile,
            run=lambda env, r=reqs, m=more: delta(env, r, **m),
            covers=("ssm.plan",),
        )
    )
for name, (reqs, profile, more) in (STEPS | CONVS).items():
    add(
        Case(
            op="ssm.causal_conv1d",
            name=name,
            profile=profile,
            run=lambda env, r=reqs, m=more: conv(env, r, **m),
            exact=("conv",),
            covers=("ssm.plan",),
        )
    )
