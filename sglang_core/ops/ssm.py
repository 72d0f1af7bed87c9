"""State-space ops: a causal convolution and the gated delta rule, whose states live in a pool, a slot each, and the gates of that rule.

The gated delta rule (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464) keeps a matrix S per value head. A token lets it decay,
reads what S has stored under its key, and replaces a part `beta` of that by its value:

    S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q

It has two forms. The recurrent one is these lines, a token at a time. The chunked one takes CHUNK tokens at once: what they
write to S solves one unit triangular system (the WY representation of a product of Householder-like matrices, Yang et al. 2024,
arXiv 2406.06484), and the rest is a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.backend.state_pool import StatePool
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide, wide_dtype
from sglang_core.ops.ssm_plan import CHUNK, GatedDeltaSpec, StatePlan

ConvActivation = Literal["silu"]
L2_EPS = 1e-6
# Reqs are taken in blocks; the states of one, its queries, keys and values of a chunk, and their products hold no more each.
BLOCK_ELEMENTS = 1 << 22

# q, k: [B, L, Hk, Dk], v: [B, L, Hv, Dv], g, beta: [B, L, Hv], state: [B, Hv, Dk, Dv], all wide -> o as v, the new state
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@op("ssm.causal_conv1d")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: StatePool,
    layer: int,
    plan: StatePlan,
    *,
    activation: ConvActivation | None = None,
) -> Tensor:
    """Each channel is a weighted sum of its last W inputs, the newest by weight[:, -1]; the last W - 1 of a req are its state.

    x: [T, C], weight: [C, W], bias: [C] -> [T, C]. Reads the state at plan.read_slots (zeros where that is 0) and writes it at
    plan.write_slots, rounded to the pool's dtype. float32 inside, activation included; one rounding to x.dtype at the end.
    Tokens of no req give zeros.
    """
    tail, kept = pool.conv(layer), weight.shape[1] - 1
    req, offset, real = _owners(x.shape[0], plan.cu_extend)
    token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    y = wide(x).new_zeros(x.shape) if bias is None else wide(bias).expand(x.shape)
    x = _some_row(x)
    for back in range(kept, -1, -1):
        tap = _inputs(x, tail, token - back, offset - back, plan.read_slots[req])
        y = y + tap * wide(weight)[:, kept - back]
    start, stop = plan.cu_extend[:-1, None], plan.cu_extend[1:, None]
    last = torch.arange(kept, 0, -1, dtype=torch.int32, device=x.device)
    state = _inputs(x, tail, stop - last, stop - start - last, plan.read_slots[:, None])
    tail.index_put_((plan.write_slots,), state.to(tail.dtype))
    y = y if activation is None else F.silu(y)
    return torch.where(real[:, None], y, 0.0).to(x.dtype)


def _some_row(x: Tensor) -> Tensor:
    """x, or one row of zeros where it has none: what nobody looks at is read from somewhere."""
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:])


def _inputs(x: Tensor, tail: Tensor, token: Tensor, offset: Tensor, slots: Tensor) -> Tensor:
    """Inputs by place: row `token` of x where `offset`, its place among the req's new tokens, is not negative, else out of
    the state in `slots`. token, offset, slots: int32[...] -> [..., C], wide."""
    kept = tail.shape[1]
    stored = tail[slots, (offset + kept).clamp(0, kept - 1)]
    stored = torch.where((slots > 0)[..., None].expand(stored.shape), wide(stored), 0.0)
    return torch.where((offset >= 0)[..., None], wide(x[token.clamp(min=0)]), stored)


def _owners(num_tokens: int, cu_extend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """req: int32[T], offset: int32[T] among its req's new tokens, real: bool[T]. Of tokens of no req, req and offset are any."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=cu_extend.device)
    req = torch.searchsorted(cu_extend[1:], token, right=True, out_int32=True)
    real = req < cu_extend.shape[0] - 1
    req = torch.where(real, req, 0)
    return req, token - cu_extend[req], real


@op("ssm.gates")
def gates(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """What the gated delta rule takes beside queries, keys and values: beta = sigmoid(b), g = rate * softplus(a + dt_bias).

    b, a: [T, Hk, Hv / Hk], the value heads of each key head, slices of a fused projection that may begin and step at any place;
    rate, dt_bias: float32[Hv] -> g, beta: float32[T, Hv]. `rate` is below 0: the -exp(A_log) of Mamba 2 (Dao, Gu 2024, arXiv 2405.21060).
    """
    b, a = wide(b).flatten(1), wide(a).flatten(1)
    return rate.to(a.dtype) * F.softplus(a + dt_bias.to(a.dtype)), b.sigmoid()


@op("ssm.gated_delta_rule")
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    pool: StatePool,
    layer: int,
    spec: GatedDeltaSpec,
    plan: StatePlan,
) -> Tensor:
    """The gated delta rule over each req's new tokens, from its state on.

    q, k: [T, Hk, Dk], v: [T, Hv, Dv], g, beta: float32[T, Hv] -> o: [T, Hv, Dv] in v.dtype. g is the logarithm of the decay, at
    most 0; beta is in [0, 1]. With qk_l2norm, q and k become x / sqrt(sum of x^2 + 1e-6); q is multiplied by spec.scale. Reads
    states at plan.read_slots (zeros where that is 0) and writes them at plan.write_slots, in the pool's dtype, float32; a req
    without new tokens has its state copied. float32 inside, one rounding of o at the end. Tokens of no req give zeros.
    """
    o = v.new_zeros(v.shape[0] + 1, *v.shape[1:])  # the last row takes what belongs to no token
    inputs = tuple(map(_some_row, (q, k, v, g, beta)))
    advance = partial(_advance, o, inputs, pool.state(layer), spec, plan)
    chunked = plan.static.active[0] if plan.static.active else 0
    for start, stop in _blocks(0, chunked, spec, CHUNK):
        # The reqs are in order of length: those of the block that reach into a chunk are its first ones.
        counts = [min(stop, n) - start for n in plan.static.active if n > start]
        advance(plan.order[start:stop], counts, CHUNK, chunked_rule)
    for start, stop in _blocks(chunked, plan.static.num_reqs, spec, 1):
        advance(plan.order[start:stop], [stop - start], 1, recurrent_rule)
    return o[:-1]


def _blocks(start: int, stop: int, spec: GatedDeltaSpec, length: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in parts that are worked on at once, `length` tokens of each req at a time."""
    dims = spec.k_head_dim + spec.v_head_dim
    size = spec.num_v_heads * max(spec.k_head_dim * spec.v_head_dim, length * max(dims, length))
    step = max(1, BLOCK_ELEMENTS // size)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _advance(
    o: Tensor,
    inputs: tuple[Tensor, ...],
    leaf: Tensor,
    spec: GatedDeltaSpec,
    plan: StatePlan,
    rows: Tensor,
    counts: list[int],
    length: int,
    rule: Rule,
) -> None:
    """Take the reqs `rows` through all their tokens, `length` at a time; the first counts[i] have more than i * length."""
    read, dtype = plan.read_slots[rows], wide_dtype(inputs[2].dtype)
    state = torch.where((read > 0)[:, None, None, None], leaf[read].to(dtype), 0.0)
    for i, count in enumerate(counts):
        offset = torch.arange(i * length, (i + 1) * length, dtype=torch.int32, device=rows.device)
        token = plan.cu_extend[rows[:count], None] + offset
        real = token < plan.cu_extend[rows[:count] + 1, None]
        token = torch.where(real, token, 0)
        # A token that is none has no decay and no beta: it changes nothing. Its inputs may be NaN.
        q, k, v, g, beta = (
            torch.where(real.view(*real.shape, *(1,) * (x.ndim - 1)), x[token].to(dtype), 0.0) for x in inputs
        )
        if spec.qk_l2norm:
            q, k = _unit(q), _unit(k)
        out, new = rule(q * spec.scale, k, v, g, beta, state[:count])
        state = torch.cat([new, state[count:]])
        o.index_put_((torch.where(real, token, o.shape[0] - 1),), out.to(o.dtype))
    leaf.index_put_((plan.write_slots[rows],), state.to(leaf.dtype))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def recurrent_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A `Rule`, a token at a time."""
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        stored = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        written = (v[:, t] - stored) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, dim=1), state


def chunked_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A `Rule`, all tokens at once.

    With D[i, j] the decay from token j to token i, and D[i] that from before the chunk, what the tokens write solves
    (1 + A) X = beta (v - D S^T k), where A[i, j] = beta[i] (k[i] . k[j]) D[i, j] below the diagonal.
    """
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g[..., None], beta[..., None]))  # [B, Hv, L, ...]
    start = g.cumsum(2).exp()  # from the chunk's start to each token
    # Summed anew for each j: differences of running sums would lose what little decay there is after much of it.
    decay = g.expand(*g.shape[:3], g.shape[2]).tril(-1).cumsum(2).exp().tril()
    system = (beta * k) @ k.transpose(2, 3) * decay
    given = beta * (v - start * (k @ state))
    # Reads the part below the diagonal only, and takes the diagonal for ones.
    written = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    out = start * (q @ state) + (q @ k.transpose(2, 3) * decay) @ written
    state = start[:, :, -1:] * state + (decay[:, :, -1:].transpose(2, 3) * k).transpose(2, 3) @ written
    return out.transpose(1, 2), state
