"""ssm.gated_delta_rule in its two forms; a req's own number of new tokens says which it takes, so that its neighbours change no bit.

Up to SHORT tokens: `_recurrent`, a program for some columns of a state, which stay in registers from token to token.

More: chunks of 64 tokens, in two launches. `_prepare` does for all chunks side by side what needs no state: it inverts 1 + A, the
unit triangular system that the tokens' writes solve (the UT transform; Yang et al. 2024, arXiv 2406.06484 and 2412.06464), and
multiplies queries by keys. `_scan` takes some columns of a state through a req's chunks, five products each.

All is float32, products on matrix units too, for what is rounded in a state stays in it for thousands of tokens: a state meets bfloat16
inputs in three parts of bfloat16, and float32 tiles each other as TF32 in three parts where a device has that (PRECISION in the configs).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api import StatePool
from sglang_core.api.ops import GatedDeltaSpec, StatePlan
from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import dot, rounded, widen
from sglang_triton.ragged import count_up_to
from sglang_triton.rows import dense_last
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

SHORT = 8  # tokens: a chunk costs a few times as much as one of them, whatever it has
CHUNK = 64
PART = tl.constexpr(
    16
)  # rows of 1 + A that are inverted one after the other, in all parts at once; products put the parts together


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
    """q, k: [T, Hk, Dk], v: [T, Hv, Dv], g, beta: float32[T, Hv] -> [T, Hv, Dv] in v.dtype; states as the op's body says."""
    q, k, v, g, beta = (dense_last(t) for t in (q, k, v, g, beta))
    num_tokens, heads, dim = v.shape
    num_reqs = plan.static.num_reqs
    o = torch.empty(num_tokens, heads, dim, dtype=v.dtype, device=v.device)
    places = (plan.cu_extend, plan.read_slots, plan.write_slots)
    strides = (
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        g.stride(0),
        beta.stride(0),
    )
    facts: dict[str, Any] = {"HV": heads, "GROUP": heads // spec.num_k_heads, "DK": spec.k_head_dim, "DV": dim}
    facts |= {"L2NORM": spec.qk_l2norm, "SHORT": SHORT, "BLOCK_K": max(16, triton.next_power_of_2(spec.k_head_dim))}
    state = pool.state(layer)

    config, blocks = _columns("ssm.recurrent", spec)
    _recurrent[(num_reqs + 1, heads, blocks)](
        q, k, v, g, beta, state, o, *places, num_tokens, num_reqs, spec.scale, *strides, **facts, **config
    )
    if not plan.static.active or plan.static.max_extend <= SHORT:
        return o
    solved, scores = torch.empty(
        2, num_tokens // CHUNK + num_reqs, heads, CHUNK, CHUNK, dtype=torch.float32, device=v.device
    )
    _prepare[(solved.shape[0], heads)](
        q,
        k,
        g,
        beta,
        solved,
        scores,
        plan.cu_extend,
        num_reqs,
        num_reqs.bit_length(),
        spec.scale,
        *strides[:4],
        *strides[6:],
        CHUNK=CHUNK,
        **{name: fact for name, fact in facts.items() if name not in ("DV", "BLOCK_K")},
        **choose("ssm.prepare"),
    )
    config, blocks = _columns("ssm.scan", spec)
    _scan[(num_reqs, heads, blocks)](
        q,
        k,
        v,
        g,
        solved,
        scores,
        state,
        o,
        plan.order,
        *places,
        spec.scale,
        *strides[:7],
        CHUNK=CHUNK,
        **facts,
        **config,
    )
    return o


def _columns(op: str, spec: GatedDeltaSpec) -> tuple[dict[str, Any], int]:
    """The config of a kernel whose programs share a state's columns, and how many programs that makes."""
    config = dict(choose(op))
    config["BLOCK_V"] = min(config["BLOCK_V"], max(16, triton.next_power_of_2(spec.v_head_dim)))
    return config, triton.cdiv(spec.v_head_dim, config["BLOCK_V"])


@triton.jit
def _recurrent(
    q,
    k,
    v,
    g,
    beta,
    state,
    o,
    cu,
    read,
    write,
    T,
    R,
    scale,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    g_stride,
    beta_stride,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L2NORM: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: a req of at most SHORT tokens, a value head, BLOCK_V columns of its state. Req R: zeros to the tokens of no req."""
    take_turn()
    req, head = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = tl.load(cu + req)
    target = o + head * DV + column
    if req == R:
        for token in range(start, T):
            zeros = tl.zeros([BLOCK_V], o.dtype.element_ty)
            tl.store(target + tl.cast(token, tl.int64) * HV * DV, zeros, column < DV)
    else:
        stop = tl.load(cu + req + 1)
        if stop - start <= SHORT:
            s = load_state(state, tl.load(read + req), head, row, column, HV, DK, DV)
            for token in range(start, stop):
                at = tl.cast(token, tl.int64)
                there, group = (row < DK)[:, None], head // GROUP
                key = widen(tl.load(k + at * k_stride_t + group * k_stride_h + row[:, None], there, other=0.0))
                query = widen(tl.load(q + at * q_stride_t + group * q_stride_h + row[:, None], there, other=0.0))
                if L2NORM:
                    key *= tl.rsqrt(tl.sum(key * key, axis=0, keep_dims=True) + 1e-6)
                    query *= tl.rsqrt(tl.sum(query * query, axis=0, keep_dims=True) + 1e-6)
                value = widen(tl.load(v + at * v_stride_t + head * v_stride_h + column, column < DV, other=0.0))
                s *= tl.exp(tl.load(g + at * g_stride + head))
                written = (value - tl.sum(s * key, axis=0)) * tl.load(beta + at * beta_stride + head)
                s += key * written[None, :]
                out = tl.sum(s * query, axis=0) * scale
                tl.store(target + at * HV * DV, rounded(out, o.dtype.element_ty), column < DV)
            store_state(state, tl.load(write + req), head, row, column, s, HV, DK, DV)


@triton.jit
def _prepare(
    q,
    k,
    g,
    beta,
    solved,
    scores,
    cu,
    R,
    steps,
    scale,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    g_stride,
    beta_stride,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    L2NORM: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a chunk of a req of more than SHORT tokens, a value head. solved, scores: float32[places, HV, CHUNK, CHUNK].

    With D[i, j] the decay from token j to token i, A[i, j] = beta[i] (k[i] . k[j]) D[i, j] below the diagonal: `solved` is
    (1 + A)^-1 diag(beta), and `scores` (q[i] . k[j]) D[i, j] on and below it. The chunks of req r have the places from
    cu[r] // CHUNK + r on: no two reqs share one, and a launch knows how many there are at most.
    """
    take_turn()
    place, head = tl.program_id(0), tl.program_id(1)
    req = count_up_to(cu, place, R, steps, CHUNK, 1)
    if req < R:
        start, stop = tl.load(cu + req), tl.load(cu + req + 1)
        first = start + (place - start // CHUNK - req) * CHUNK
        if (stop - start > SHORT) & (first < stop):
            own = tl.arange(0, CHUNK)
            at, there = tl.cast(first, tl.int64), first + own < stop
            by_key, by_query = key_products(
                k + at * k_stride_t + (head // GROUP) * k_stride_h,
                q + at * q_stride_t + (head // GROUP) * q_stride_h,
                own,
                there,
                k_stride_t,
                q_stride_t,
                DK,
                L2NORM,
                BLOCK_D,
            )
            step = tl.load(g + (at + own) * g_stride + head, there, other=0.0)
            weight = tl.load(beta + (at + own) * beta_stride + head, there, other=0.0)
            later, earlier = own[None, :], own[:, None]
            # Summed anew from each token on: differences of running sums would lose what little decay there is after much of it.
            decay = tl.exp(tl.cumsum(tl.where(later > earlier, step[None, :], 0.0), axis=1))
            decay = tl.where(later >= earlier, decay, 0.0)
            system = tl.where(later > earlier, by_key * decay * weight[None, :], 0.0)
            score = by_query * tl.trans(decay) * scale
            inside = earlier * CHUNK + later
            tile = (tl.cast(place, tl.int64) * HV + head) * CHUNK * CHUNK
            tl.store(scores + tile + inside, score)
            tl.store(solved + tile + inside, inverse(system, PRECISION, CHUNK) * weight[None, :])


@triton.jit
def key_products(
    k,
    q,
    own,
    there,
    k_stride,
    q_stride,
    DK: tl.constexpr,
    L2NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and queries of a chunk times its keys: two float32[n, n]. Lengths are summed beside the products and divided out of them."""
    by_key = tl.zeros([own.shape[0], own.shape[0]], tl.float32)
    by_query = tl.zeros([own.shape[0], own.shape[0]], tl.float32)
    key_size = tl.zeros([own.shape[0], 1], tl.float32)
    query_size = tl.zeros([own.shape[0], 1], tl.float32)
    for start in range(0, DK, BLOCK_D):
        key = rows_of(k + start, own, there, k_stride, DK - start, BLOCK_D)
        query = rows_of(q + start, own, there, q_stride, DK - start, BLOCK_D)
        by_key = dot(key, tl.trans(key), by_key)
        by_query = dot(query, tl.trans(key), by_query)
        key_size += squares(key)
        query_size += squares(query)
    key_factor = factor(key_size, L2NORM)
    by_key *= key_factor * tl.trans(key_factor)
    by_query *= factor(query_size, L2NORM) * tl.trans(key_factor)
    return by_key, by_query


@triton.jit
def inverse(upper, PRECISION: tl.constexpr, CHUNK: tl.constexpr):
    """upper: float32[CHUNK, CHUNK], what is above the diagonal, the transpose of A -> (1 + A)^-1.

    Rows of the parts along the diagonal one after the other, all parts at once. With D what they become, and N = D times
    A's other parts, whose fourth power is zero: (1 + A)^-1 = (1 - N)(1 + N^2) D.
    """
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    same = row // PART == column // PART
    within, other = tl.where(same, upper, 0.0), tl.trans(tl.where(same, 0.0, upper))
    made = tl.where(row == column, 1.0, 0.0)
    for i in range(1, PART):
        given = tl.sum(tl.where(column % PART == i, within, 0.0), axis=1)
        taken = tl.sum(given[:, None] * made, axis=0)
        made = tl.where(same & (row % PART == i), made - taken[None, :], made)
    n = tl.dot(made, other, input_precision=PRECISION)
    square = tl.dot(n, n, input_precision=PRECISION)
    made += tl.dot(square, made, input_precision=PRECISION)
    return made - tl.dot(n, made, input_precision=PRECISION)


@triton.jit
def _scan(
    q,
    k,
    v,
    g,
    solved,
    scores,
    state,
    o,
    order,
    cu,
    read,
    write,
    scale,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    g_stride,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L2NORM: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a req of more than SHORT tokens, the longest first, a value head, BLOCK_V columns of its state."""
    take_turn()
    req, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    row, column = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    start, stop = tl.load(cu + req), tl.load(cu + req + 1)
    if stop - start > SHORT:
        own, left_of = tl.arange(0, CHUNK), tl.program_id(2) * BLOCK_V
        inside = own[:, None] * CHUNK + own[None, :]
        s = load_state(state, tl.load(read + req), head, row, column, HV, DK, DV)
        for chunk in range((stop - start + CHUNK - 1) // CHUNK):
            first = start + chunk * CHUNK
            at, there = tl.cast(first, tl.int64), first + own < stop
            key = rows_of(k + at * k_stride_t + (head // GROUP) * k_stride_h, own, there, k_stride_t, DK, BLOCK_K)
            query = rows_of(q + at * q_stride_t + (head // GROUP) * q_stride_h, own, there, q_stride_t, DK, BLOCK_K)
            value = rows_of(
                v + at * v_stride_t + head * v_stride_h + left_of, own, there, v_stride_t, DV - left_of, BLOCK_V
            )
            step = tl.load(g + (at + own) * g_stride + head, there, other=0.0)
            following = tl.load(
                g + (at + own + 1) * g_stride + head, (first + own + 1 < stop) & (own < CHUNK - 1), other=0.0
            )
            begun = tl.exp(tl.cumsum(step, axis=0))[:, None]  # from the chunk's start to each token
            left = tl.exp(tl.cumsum(following, axis=0, reverse=True))[:, None]  # from each token to the chunk's end
            key_factor, query_factor = factor(squares(key), L2NORM), factor(squares(query), L2NORM) * scale
            tile = ((start // CHUNK + req + chunk).to(tl.int64) * HV + head) * CHUNK * CHUNK
            given = widen(value) - begun * key_factor * dot_state(key, s, PRECISION)
            written = tl.dot(tl.load(solved + tile + inside), given, input_precision=PRECISION)
            out = begun * query_factor * dot_state(query, s, PRECISION)
            out += tl.dot(tl.load(scores + tile + inside), written, input_precision=PRECISION)
            target = o + (at * HV + head) * DV
            tl.store(
                target + own[:, None] * (HV * DV) + column[None, :],
                rounded(out, o.dtype.element_ty),
                there[:, None] & (column < DV)[None, :],
            )
            added = dot_state(tl.trans(key), written * left * key_factor, PRECISION)
            s = s * tl.exp(tl.sum(step, axis=0)) + added
        store_state(state, tl.load(write + req), head, row, column, s, HV, DK, DV)


@triton.jit
def dot_state(a, b, PRECISION: tl.constexpr):
    """a: [m, k], as inputs come, b: float32[k, n] -> float32[m, n] with no digit of b lost.

    bfloat16 on matrix units: b as the sum of three bfloat16, 8 of its 24 bits each, the smallest first.
    """
    if a.dtype == tl.bfloat16:
        high = rounded(b, tl.bfloat16)
        rest = b - widen(high)
        middle = rounded(rest, tl.bfloat16)
        y = dot(a, rounded(rest - widen(middle), tl.bfloat16), tl.zeros([a.shape[0], b.shape[1]], tl.float32))
        y = dot(a, high, dot(a, middle, y))
    else:
        y = tl.dot(widen(a), b, input_precision=PRECISION)
    return y


@triton.jit
def rows_of(x, own, there, stride, DIM, BLOCK: tl.constexpr):
    """Rows `own` of DIM elements, from x on -> [n, BLOCK] of x's dtype, zeros where there is nothing."""
    column = tl.arange(0, BLOCK)
    return tl.load(x + own[:, None] * stride + column[None, :], there[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def squares(x):
    """x: [n, D] -> float32[n, 1], sums."""
    x = widen(x)
    return tl.sum(x * x, axis=1, keep_dims=True)


@triton.jit
def factor(sum_of_squares, L2NORM: tl.constexpr):
    """What rows are multiplied by: with L2NORM, one over their length."""
    if L2NORM:
        y = tl.rsqrt(sum_of_squares + 1e-6)
    else:
        y = tl.full(sum_of_squares.shape, 1.0, tl.float32)
    return y


@triton.jit
def load_state(state, slot, head, row, column, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """Columns of a state: [row, column], zeros from slot 0. state: [N, HV, DK, DV]."""
    at = ((slot.to(tl.int64) * HV + head) * DK + row[:, None]) * DV + column[None, :]
    rows = tl.where(slot > 0, DK, 0)
    return widen(tl.load(state + at, (row < rows)[:, None] & (column < DV)[None, :], other=0.0))


@triton.jit
def store_state(state, slot, head, row, column, value, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """The inverse of `load_state`."""
    at = ((slot.to(tl.int64) * HV + head) * DK + row[:, None]) * DV + column[None, :]
    tl.store(state + at, rounded(value, state.dtype.element_ty), (row < DK)[:, None] & (column < DV)[None, :])


_HALVES = dict.fromkeys(("q", "k", "v", "o"), "*bf16")
_FLOATS = dict.fromkeys(("g", "beta", "state", "solved", "scores"), "*fp32")
_PLACES = dict.fromkeys(("cu", "read", "write", "order"), "*i32")
_STRIDES = (
    "q_stride_t",
    "q_stride_h",
    "k_stride_t",
    "k_stride_h",
    "v_stride_t",
    "v_stride_h",
    "g_stride",
    "beta_stride",
)
_SIGNATURE = _HALVES | _FLOATS | _PLACES | {"scale": "fp32"} | dict.fromkeys(("T", "R", "steps", *_STRIDES), "i32")
_FACTS = {"HV": 32, "GROUP": 2, "L2NORM": True, "SHORT": SHORT, "CHUNK": CHUNK}
DOTS = {"sm_": "mma", "gfx9": "mfma"}
AOT = tuple(
    AotSpec(
        op="ssm.gated_delta_rule",
        tuned_as=f"ssm.{name}",
        name=f"{name}, D=128",
        kernel=kernel,
        signature=_SIGNATURE,
        constexprs=_FACTS | {"DK": 128, "DV": 128, "BLOCK_K": 128},
        odd=("T", "R", "steps"),
        instructions={} if name == "recurrent" else DOTS,
    )
    for name, kernel in (("recurrent", _recurrent), ("prepare", _prepare), ("scan", _scan))
)
