"""Recurrent layers: a decode step reads and writes a whole state a req."""

from __future__ import annotations

from functools import partial

import torch

from sglang_conformance.perf.attention import MOST_LAYERS, reqs_of
from sglang_conformance.perf.load import STEPS, PerfEnv, Work, add, copies_of, size_of
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch

SPEC = GatedDeltaSpec(num_k_heads=8, num_v_heads=16, k_head_dim=128, v_head_dim=128, conv_width=4, scale=128**-0.5)


def batch_of(tokens: int) -> StateBatch:
    """Decoding reqs have a state, a prompt has none; each writes where it read, or to the slot that it gets."""
    extends = [extend for _, extend in reqs_of(tokens)]
    slots = torch.arange(1, len(extends) + 1, dtype=torch.int32)
    return StateBatch(
        cu_extend_cpu=torch.tensor([0, *extends]).cumsum(0).int(),
        read_slots_cpu=slots if max(extends) == 1 else torch.zeros_like(slots),
        write_slots_cpu=slots,
        num_tokens=tokens,
        num_reqs=len(extends),
        max_extend=max(extends),
    )


def pool_of(env: PerfEnv, batch: StateBatch, conv: tuple[int, int], state: tuple[int, int, int]) -> StatePool:
    nbytes = batch.num_reqs * (conv[0] * conv[1] * env.dtype.itemsize + state[0] * state[1] * state[2] * 4)
    layers = min(MOST_LAYERS, copies_of(nbytes))
    spec = StatePoolSpec(num_layers=layers, conv_shape=conv, conv_dtype=env.dtype, state_shape=state)
    pool = env.state_pool(spec, batch.num_reqs + 1)
    slots = env.place(torch.arange(1, batch.num_reqs + 1, dtype=torch.int32))
    states = env.normal(batch.num_reqs, *conv), env.normal(batch.num_reqs, *state, scale=0.1).float()
    for layer in range(layers):
        pool.scatter(layer, slots, *states)
    return pool


def delta(env: PerfEnv, tokens: int) -> Work:
    """A token and head: decay the state, read it by the key, add an outer product, read it by the query."""
    spec, batch = SPEC, batch_of(tokens)
    ops = env.state_ops(spec)
    shape = (spec.num_v_heads, spec.k_head_dim, spec.v_head_dim)
    pool = pool_of(env, batch, (spec.conv_width - 1, spec.conv_dim), shape)
    plan = ops["ssm.plan"](spec, batch, env.device)
    q, k = (env.normal(tokens, spec.num_k_heads, spec.k_head_dim, scale=0.1) for _ in range(2))
    v = env.normal(tokens, spec.num_v_heads, spec.v_head_dim)
    g, beta = (env.place(torch.full((tokens, spec.num_v_heads), x)) for x in (-0.3, 0.5))
    state = shape[0] * shape[1] * shape[2]
    return Work(
        calls=[
            partial(ops["ssm.gated_delta_rule"], q, k, v, g, beta, pool, layer, spec, plan)
            for layer in range(pool.spec.num_layers)
        ],
        nbytes=2 * batch.num_reqs * state * 4 + size_of(q, k, v, g, beta) + size_of(v),
        flops=7 * tokens * state,
    )


def conv(env: PerfEnv, tokens: int) -> Work:
    spec, batch = SPEC, batch_of(tokens)
    ops = env.state_ops(spec)
    shape = (spec.conv_width - 1, spec.conv_dim)
    pool = pool_of(env, batch, shape, (1, 1, 1))
    plan = ops["ssm.plan"](spec, batch, env.device)
    x, weight = env.normal(tokens, spec.conv_dim), env.normal(spec.conv_dim, spec.conv_width)
    return Work(
        calls=[
            partial(ops["ssm.causal_conv1d"], x, weight, None, pool, layer, plan, activation="silu")
            for layer in range(pool.spec.num_layers)
        ],
        nbytes=2 * size_of(x) + size_of(weight) + 2 * batch.num_reqs * shape[0] * shape[1] * x.element_size(),
        flops=2 * tokens * spec.conv_dim * spec.conv_width,
    )


def gates(env: PerfEnv, tokens: int) -> Work:
    """Of the projection as it lies; what comes out is float32."""
    key_heads, heads = SPEC.num_k_heads, SPEC.num_v_heads
    op = env.op("ssm.gates", dims={"Hk": key_heads, "Hv": heads})
    rate, bias = env.place(torch.full((heads,), -0.5)), env.place(torch.zeros(heads))
    shape = (tokens, key_heads, 2, heads // key_heads)
    given = env.tensors(*shape, copies=copies_of(size_of(env.normal(*shape))))
    calls = [partial(op, *x.unbind(2), rate, bias) for x in given]
    return Work(calls=calls, nbytes=size_of(given[0]) + 2 * tokens * heads * 4)


for name, make in {"ssm.gated_delta_rule": delta, "ssm.causal_conv1d": conv, "ssm.gates": gates}.items():
    for step, tokens in STEPS.items():
        add(name, step, partial(make, tokens=tokens))
