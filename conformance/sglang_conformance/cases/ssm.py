"""Recurrent ops over a pool of states that is full of NaN but for the states that live in it, in slots of random order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import HALVES, Case, Outputs, Profile, add
from sglang_conformance.cases.rows import PADDED, TOGETHER
from sglang_conformance.env import Env
from sglang_conformance.guard import same_bits
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch

LAYER, NUM_LAYERS = 1, 2
NEAR = 4  # slots at the beginning of a pool that an index which wrapped around leads to
Reqs = list[tuple[bool, int]]  # (has a state, extend) each

DECODE: Reqs = [(True, 1)] * 5
FIRST: Reqs = [(False, 1)] * 3
PREFILL: Reqs = [(False, 70), (False, 9), (False, 64)]
CHUNK: Reqs = [(True, 65), (True, 2), (True, 128)]
MIXED: Reqs = [(True, 1), (False, 33), (True, 150), (False, 1), (True, 1), (True, 3)]
IDLE: Reqs = [(True, 0), (True, 2), (False, 0), (True, 0), (False, 1)]


def spec_of(k_heads: int = 2, v_heads: int = 4, k_dim: int = 32, v_dim: int = 32, **more: Any) -> GatedDeltaSpec:
    facts = {"conv_width": 4, "scale": k_dim**-0.5} | more
    return GatedDeltaSpec(num_k_heads=k_heads, num_v_heads=v_heads, k_head_dim=k_dim, v_head_dim=v_dim, **facts)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A batch in host integers, and the pool with the state of every req that has one."""

    batch: StateBatch
    pool: StatePool
    first: int  # slots from here on may be read and written

    def part(self, start: int, stop: int) -> tuple[Step, slice]:
        """The step of the reqs [start, stop) alone, unpadded, and the rows of its tokens in the whole."""
        b = self.batch
        rows = slice(int(b.cu_extend_cpu[start]), int(b.cu_extend_cpu[stop]))
        cu = b.cu_extend_cpu[start : stop + 1] - b.cu_extend_cpu[start]
        batch = replace(
            b,
            cu_extend_cpu=cu,
            read_slots_cpu=b.read_slots_cpu[start:stop],
            write_slots_cpu=b.write_slots_cpu[start:stop],
            num_tokens=rows.stop - rows.start,
            num_reqs=stop - start,
            max_extend=int(cu.diff().max()),
            static=False,
        )
        return replace(self, batch=batch), rows


def make_step(
    env: Env, spec: GatedDeltaSpec, reqs: Reqs, *, padding: int = 0, in_place: bool = False, far: bool = False
) -> Step:
    """`padding` more reqs and tokens than there are, as in a bucket. `in_place`: a state is written where it was read.

    `far`: slot times the size of a state does not fit 32 bits. Most of such a pool is never touched.
    """
    count = len(reqs)
    state_shape = (spec.num_v_heads, spec.k_head_dim, spec.v_head_dim)
    first = 1 + (env.far(2**31 // torch.Size(state_shape).numel()) if far else 0)
    slots = env.permutation(2 * count) + first
    started = torch.tensor([has_state for has_state, _ in reqs])
    read = torch.where(started, slots[:count], 0)
    write = torch.where(started, slots[:count], slots[count:]) if in_place else slots[count:]
    pool_spec = StatePoolSpec(
        num_layers=NUM_LAYERS if not far else LAYER + 1,
        conv_shape=(spec.conv_width - 1, spec.conv_dim),
        conv_dtype=env.dtype,
        state_shape=state_shape,
    )
    num_slots = first + 2 * count
    pool = env.state_pool(pool_spec, num_slots, poisoned=False)
    pool.poison([*range(min(NEAR, first)), *range(first, num_slots)])
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
    return Step(batch=batch, pool=pool, first=first)


def float32(env: Env, *shape: int) -> Tensor:
    """Normal numbers in float32, whatever the case's dtype."""
    return env.place(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


class Recurrent(ABC):
    """One of the ops, bound, with what a layer gives it. Called with a step and its inputs, packed over the tokens."""

    op: str
    kept: int  # which of a slot's two tensors it writes

    def __init__(self, env: Env, spec: GatedDeltaSpec | None = None) -> None:
        self.env, self.spec = env, spec or spec_of()
        self.ops = env.state_ops(self.spec)

    @abstractmethod
    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        """What the op is given for each token."""

    @abstractmethod
    def __call__(self, step: Step, *inputs: Tensor) -> Tensor:
        """A row for each token."""

    def plan(self, step: Step) -> Any:
        return self.ops["ssm.plan"](self.spec, step.batch, self.env.device)

    def written(self, step: Step) -> Tensor:
        """What every slot but scratch holds; NaN where nobody wrote."""
        slots = torch.arange(step.first, step.pool.num_slots, dtype=torch.int32)
        return step.pool.gather(LAYER, self.env.place(slots))[self.kept]

    def run(self, reqs: Reqs, *, strides: int = 0, in_place: bool = False, **step_facts: Any) -> Outputs:
        """Twice, where it reads what it read before. `strides`: inputs are slices, so many elements in."""
        step = make_step(self.env, self.spec, reqs, in_place=in_place, **step_facts)
        inputs = self.inputs(step.batch.num_tokens)
        if strides:
            inputs = tuple(self.env.sliced(x, strides) for x in inputs)
        first = self(step, *inputs)
        again = first if in_place else self(step, *inputs)
        return {"y": first, "y, again": again, "state": self.written(step)}


class Delta(Recurrent):
    op, kept = "ssm.gated_delta_rule", 1

    def __init__(self, env: Env, spec: GatedDeltaSpec | None = None, *, decay: float = 0.3) -> None:
        """`decay`: the mean of -g."""
        super().__init__(env, spec)
        self.decay = decay

    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        s, env = self.spec, self.env
        q, k = (env.normal(tokens, s.num_k_heads, s.k_head_dim, scale=s.k_head_dim**-0.5) for _ in range(2))
        v = env.normal(tokens, s.num_v_heads, s.v_head_dim)
        g, beta = torch.rand(2, tokens, s.num_v_heads, generator=torch.Generator().manual_seed(tokens))
        return q, k, v, env.place(g * -2 * self.decay), env.place(beta)

    def __call__(self, step: Step, *inputs: Tensor) -> Tensor:
        return self.ops[self.op](*inputs, step.pool, LAYER, self.spec, self.plan(step))  # type: ignore[no-any-return]


class Conv(Recurrent):
    op, kept = "ssm.causal_conv1d", 0

    def __init__(self, env: Env, spec: GatedDeltaSpec | None = None, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__(env, spec)
        channels = self.spec.conv_dim
        self.weight = env.normal(channels, self.spec.conv_width)
        self.bias = env.normal(channels) if bias else None
        self.activation = "silu" if silu else None

    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        return (self.env.normal(tokens, self.spec.conv_dim),)

    def __call__(self, step: Step, *inputs: Tensor) -> Tensor:
        given = (*inputs, self.weight, self.bias, step.pool, LAYER, self.plan(step))
        return self.ops[self.op](*given, activation=self.activation)  # type: ignore[no-any-return]


def alone_and_together(layer: Recurrent, reqs: Reqs) -> Outputs:
    """Each req in a batch of its own: the states of others are not seen."""
    step = make_step(layer.env, layer.spec, reqs)
    inputs = layer.inputs(step.batch.num_tokens)
    together, states = layer(step, *inputs), layer.written(step)
    alone = []
    for r in range(len(reqs)):
        own, rows = step.part(r, r + 1)
        alone.append(layer(own, *(x[rows] for x in inputs)))
    if layer.env.batch_invariant(layer.op):
        assert same_bits(torch.cat(alone), together), "it says batch_invariant, and a req's neighbours change its bits"
        assert same_bits(layer.written(step), states), (
            "it says batch_invariant, and a req's neighbours change its state"
        )
    return {"together": together, "alone": torch.cat(alone), "state": states, "state, alone": layer.written(step)}


def padded_or_not(layer: Recurrent, reqs: Reqs) -> Outputs:
    """A step in a bucket, whose padding rows hold NaN and then zeros, and the same step in none."""
    step = make_step(layer.env, layer.spec, reqs, padding=3)
    inputs = layer.inputs(step.batch.num_tokens)
    unpadded, rows = step.part(0, len(reqs))

    def padded(value: float) -> tuple[Tensor, Tensor]:
        given = tuple(x.clone() for x in inputs)
        for x in given:
            x[rows.stop :] = value
        return layer(step, *given)[rows], layer.written(step)

    nan, zeros = padded(float("nan")), padded(0.0)
    plain = layer(unpadded, *(x[rows] for x in inputs)), layer.written(step)
    for mine, other, without in zip(nan, zeros, plain, strict=True):
        assert same_bits(mine, other), "what padding holds changes bits of other rows, or of states"
        if layer.env.batch_invariant(layer.op):
            assert same_bits(mine, without), "it says batch_invariant, and padding changes bits"
    return {"padded": nan[0], "unpadded": plain[0], "state, padded": nan[1], "state": plain[1]}


def add_recurrent(
    op: str, name: str, run: Callable[[Env], Outputs], *, profile: Profile = "core", **facts: Any
) -> None:
    exact = ("state", "state, alone", "state, padded") if op == Conv.op else ()  # inputs, as they came
    add(Case(op=op, name=name, run=run, profile=profile, exact=exact, covers=("ssm.plan",), **facts))


ODD = spec_of(1, 3, 24, 20)
FAR = spec_of(2, 16, 128, 128)
STEPS: dict[str, tuple[Reqs, Profile, GatedDeltaSpec | None, dict[str, Any]]] = {
    "decode": (DECODE, "core", None, {}),
    "decode in place": (DECODE, "core", None, {"in_place": True}),
    "one token": ([(True, 1)], "core", None, {}),
    "first tokens": (FIRST, "core", None, {}),
    "prefill": (PREFILL, "core", None, {}),
    "chunked prefill": (CHUNK, "core", None, {}),
    "mixed": (MIXED, "core", None, {}),
    "mixed in place": (MIXED, "core", None, {"in_place": True}),
    # A req without new tokens has its state copied, or is given one of zeros.
    "some without tokens": (IDLE, "core", None, {}),
    "no tokens": ([(True, 0), (False, 0)], "core", None, {}),
    "sliced": (MIXED, "core", None, {"strides": 16}),
    "sliced at odd places": (MIXED, "odd_sizes", ODD, {"strides": 3}),
    "128 dims": ([(True, 1), (False, 80)], "core", spec_of(1, 2, 128, 128), {}),
    "as many key heads as value heads": (MIXED, "core", spec_of(4, 4), {}),
    "eight value heads a key head": (MIXED, "core", spec_of(1, 8), {}),
    "odd sizes": (MIXED, "odd_sizes", ODD, {}),
    "padded decode": (DECODE, "buckets", None, {"padding": 3}),
    "padded mixed": (MIXED, "buckets", None, {"padding": 5}),
}
LAYERS: dict[str, dict[str, Callable[[Env], Recurrent]]] = {
    Delta.op: {
        "no decay": lambda env: Delta(env, decay=0.0),
        # Running products of decays underflow within a chunk, and their inverses overflow.
        "all decays": lambda env: Delta(env, decay=20.0),
        "keys of any length": lambda env: Delta(env, spec_of(qk_l2norm=False)),
    },
    Conv.op: {
        "bias": lambda env: Conv(env, bias=True),
        "no activation": lambda env: Conv(env, silu=False),
        "two taps": lambda env: Conv(env, spec_of(conv_width=2)),
        "seven taps": lambda env: Conv(env, spec_of(conv_width=7), bias=True),
    },
}
SHORT: Reqs = [(True, 1), (False, 40)]
for layer in (Delta, Conv):
    for name, (reqs, profile, spec, more) in STEPS.items():
        add_recurrent(
            layer.op,
            name,
            lambda env, c=layer, s=spec, r=reqs, m=more: c(env, s).run(r, **m),
            profile=profile,
        )
    for name, make in LAYERS[layer.op].items():
        reqs = SHORT if name == "keys of any length" else MIXED
        add_recurrent(layer.op, name, lambda env, m=make, r=reqs: m(env).run(r))
    for name, relation, reqs, profile in (
        (TOGETHER, alone_and_together, MIXED, "core"),
        (f"{PADDED}, decode", padded_or_not, DECODE, "buckets"),
        (f"{PADDED}, mixed", padded_or_not, MIXED, "buckets"),
    ):
        add_recurrent(
            layer.op,
            name,
            lambda env, c=layer, f=relation, r=reqs: f(c(env), r),
            profile=profile,  # type: ignore[arg-type]
        )
    add_recurrent(
        layer.op,
        "slots past 2^31 elements",
        lambda env, c=layer: c(env, FAR).run([(True, 1), (True, 5), (False, 1)], far=True),
        dtypes=HALVES,
        full=True,
    )
add_recurrent(Delta.op, "1500 tokens", lambda env: Delta(env).run([(True, 1500), (False, 700)]), full=True)
