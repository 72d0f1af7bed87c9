"""What the kernels of sampling have in common: a chunk of logits, values in an order that integers compare, a row's own number."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.numerics import divided, widen

GREEDY_BELOW = tl.constexpr(1e-5)  # a temperature, as sglang_core.types has it
GROUP = tl.constexpr(64)  # tokens whose largest logit is kept where rows keep few


@triton.jit
def chunk_of(logits, chunk, R, V, stride, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr):
    """This program's rows int64[BLOCK_R], which there are, its tokens int32[CHUNK], and their logits, -inf past the last."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = there[:, None] & (token < V)[None, :]
    x = tl.load(logits + row[:, None] * stride + token[None, :], inside, other=float("-inf"))
    return row, there, token, widen(x)


@triton.jit
def store_peaks(peaks, x, row, there, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr):
    """x: float32[BLOCK_R, CHUNK], of chunk program_id(1) -> the largest of every GROUP tokens, in peaks: float32[R, S * CHUNK / GROUP]."""
    each: tl.constexpr = CHUNK // GROUP
    most = tl.max(tl.reshape(x, [BLOCK_R, each, GROUP]), axis=2)
    at = (row * tl.num_programs(1) + tl.program_id(1))[:, None] * each + tl.arange(0, each)[None, :]
    tl.store(peaks + at, most, there[:, None])


@triton.jit
def partials(x, row, there, S, BLOCK_S: tl.constexpr, other):
    """x: float32[R, S] -> this program's rows [BLOCK_R, BLOCK_S], where they are, and which of them there are."""
    chunk = tl.arange(0, BLOCK_S)[None, :]
    at, inside = row[:, None] * S + chunk, there[:, None] & (chunk < S)
    return tl.load(x + at, inside, other=other), at, inside


@triton.jit
def row_top(top, row, there, S, BLOCK_S: tl.constexpr):
    tops, _, _ = partials(top, row, there, S, BLOCK_S, float("-inf"))
    return tl.max(tops, axis=1)


@triton.jit
def best(top, first, row, there, V, S, BLOCK_S: tl.constexpr):
    """The lowest of the ids that have the row's largest logit: int32[BLOCK_R]."""
    tops, at, inside = partials(top, row, there, S, BLOCK_S, float("-inf"))
    ids = tl.load(first + at, inside, other=V - 1)
    return tl.min(tl.where(tops == tl.max(tops, axis=1)[:, None], ids, V - 1), axis=1)


@triton.jit
def warmth(temperature, row, there):
    """float32[BLOCK_R]: what logits are divided by, 1 in greedy rows."""
    warm = tl.load(temperature + row, there, other=1.0)
    return tl.where(warm < GREEDY_BELOW, 1.0, warm)


@triton.jit
def cooled(x, warm):
    """x: float32[BLOCK_R, CHUNK], warm: float32[BLOCK_R, 1] -> x / warm, rounded once."""
    return divided(x, warm, tl.div_rn(tl.full(warm.shape, 1.0, tl.float32), warm))


@triton.jit
def is_wanted(top_k, top_p, row, there, V, BY_MASS: tl.constexpr):
    """Which rows have a top-p, or a top-k, that leaves out anything."""
    if BY_MASS:
        wanted = there & (tl.load(top_p + row, there, other=1.0) < 1.0)
    else:
        wanted = there & (tl.load(top_k + row, there, other=V) < V)
    return wanted


@triton.jit
def filtered(x, temperature, min_p, peak, row, there):
    """x: float32[BLOCK_R, CHUNK] -> keys, and masses relative to the row's largest, 0 below min-p."""
    warm = warmth(temperature, row, there)[:, None]
    scaled = cooled(x, warm)
    value = tl.exp(scaled - tl.div_rn(peak[:, None], warm))
    return ordered(scaled), tl.where(value >= tl.load(min_p + row, there, other=0.0)[:, None], value, 0.0)


@triton.jit
def falls_into(masses, index, target):
    """masses: float32[BLOCK_R, N], index: int32[1, N] -> int32[BLOCK_R]: the first whose cumulative mass exceeds the target, and the
    mass before it. What has no mass is never taken, whatever rounding does; if none exceeds it, the last that has some.
    """
    cumulative = tl.cumsum(masses, axis=1)
    some = masses > 0
    last = tl.max(tl.where(some, index, 0), axis=1)
    mine = tl.min(tl.where(some & (cumulative > target[:, None]), index, last[:, None]), axis=1)
    own = index == mine[:, None]
    return mine, tl.sum(tl.where(own, cumulative - masses, 0.0), axis=1)


@triton.jit
def ordered(x):
    """x: float32 -> uint32 that compare as x does; -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def mass_of(key, peak):
    """key: uint32 of a scaled logit, peak: the largest scaled logit -> exp(scaled - peak)."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, ~key)
    return tl.exp(bits.to(tl.float32, bitcast=True) - peak)


@triton.jit
def uniform(seeds, positions, row, there):
    """float32[BLOCK_R] in [0, 1): a hash of (seed, position), as `sglang_core.ops.sampling` defines it."""
    seed = tl.load(seeds + row, there, other=0).to(tl.uint32, bitcast=True)
    position = tl.load(positions + row, there, other=0).to(tl.uint32, bitcast=True)
    bits = mix(mix(seed + 0x9E3779B9) ^ (position * 0x27D4EB2F))
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def mix(h):
    """MurmurHash3's 32-bit finaliser."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)
