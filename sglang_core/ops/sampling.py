"""Picking the next token. A row's result depends on its own logits, parameters, seed and position, and on nothing else.

Each row draws one uniform number from a counter-based hash of (seed, position) and inverts the cumulative distribution over
the vocabulary in id order. The filters apply in this order, each to what the one before left, renormalised: temperature,
top-k, top-p, min-p. Equal logits rank by id, lowest first, so top-k keeps exactly k tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide
from sglang_core.types import GREEDY_TEMPERATURE


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleParams:
    """How each row is sampled. The last three are static: they join the compile key and only save work."""

    temperature: Tensor  # float32[R]; 0 picks the most likely token
    top_p: Tensor  # float32[R]; 1 keeps all
    top_k: Tensor  # int32[R]; V keeps all
    min_p: Tensor  # float32[R]; 0 keeps all
    seeds: Tensor  # int32[R], see `fold_seed`
    positions: Tensor  # int32[R]: position of the token being sampled
    all_greedy: bool = False  # every row has temperature 0
    needs_filter: bool = True  # some row has a top-p, top-k or min-p
    max_top_k: int = 0  # where every row with a top-p or top-k has a top_k of at most this; 0: unknown


@op("sample.sample")
def sample(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
    """logits: [R, V] -> ids: int32[R], logprobs: float32[R, V] or None.

    logprobs are log_softmax of logits as given (before temperature and filters). Greedy rows take the lowest id among equals.
    top-p keeps the fewest tokens, most likely first, whose mass reaches top_p; min-p keeps those at least min_p times as
    likely as the most likely one.
    """
    logits = wide(logits)
    ids = logits.argmax(-1).to(torch.int32)
    if not params.all_greedy:
        greedy = params.temperature < GREEDY_TEMPERATURE
        ids = torch.where(greedy, ids, _draw(logits, greedy, params))
    return ids, torch.log_softmax(logits, dim=-1) if logprobs else None


def _draw(logits: Tensor, greedy: Tensor, params: SampleParams) -> Tensor:
    """One id a row, by inverting the cumulative distribution: int32[R]."""
    scaled = logits / torch.where(greedy, 1.0, params.temperature)[:, None]
    mass = torch.exp(scaled - scaled.amax(-1, keepdim=True))  # of the most likely token: 1
    if params.needs_filter:
        mass = torch.where(_kept(scaled, mass, params), mass, 0.0)
    cumulative = mass.cumsum(-1)
    # u < 1 has 24 bits, so u * total < total, and the first id whose cumulative mass exceeds it has mass of its own.
    target = uniform(params.seeds, params.positions)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target.to(cumulative.dtype), right=True, out_int32=True)
    return ids[:, 0].clamp(max=logits.shape[1] - 1)


def _kept(scaled: Tensor, mass: Tensor, params: SampleParams) -> Tensor:
    """bool[R, V]: the tokens that top-k, top-p and min-p leave.

    A sort of the values says how many tokens a row keeps; the value of the last one and its rank among equals say which.
    """
    vocab = scaled.shape[1]
    depth = min(params.max_top_k or vocab, vocab)
    top = torch.topk(scaled, depth).values if depth < vocab else torch.sort(scaled, descending=True).values
    rank = torch.arange(depth, dtype=torch.int32, device=scaled.device)
    in_top_k = rank < params.top_k[:, None]
    top_mass = torch.where(in_top_k, torch.exp(top - top[:, :1]), 0.0)
    cumulative = top_mass.cumsum(-1)
    in_top_p = (cumulative - top_mass < params.top_p[:, None] * cumulative[:, -1:]) | (params.top_p >= 1)[:, None]
    count = (in_top_k & in_top_p).sum(-1, keepdim=True).clamp(min=1)

    last = top.gather(1, count - 1)
    above, equal = scaled > last, scaled == last
    room = count - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    unranked = (params.top_k >= vocab) & (params.top_p >= 1)
    return (kept | unranked[:, None]) & (mass >= params.min_p[:, None])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions: int32[R] -> float32[R] in [0, 1), multiples of 2^-24.

    hash = mix(mix(seed + GOLDEN) ^ (position * STRIDE)), where mix is MurmurHash3's 32-bit finaliser; its top 24 bits.
    int32 arithmetic wraps around, on every device.
    """
    bits = _mix(_mix(seeds + _GOLDEN) ^ (positions * _STRIDE))
    return _shift_right(bits, 8).to(torch.float32) * 2.0**-24


_GOLDEN, _STRIDE = 0x9E3779B9 - 2**32, 0x27D4EB2F
_MIX_1, _MIX_2 = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def _mix(h: Tensor) -> Tensor:
    h = (h ^ _shift_right(h, 16)) * _MIX_1
    h = (h ^ _shift_right(h, 13)) * _MIX_2
    return h ^ _shift_right(h, 16)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """Logical, where torch's shift copies the sign."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def fold_seed(seed: int) -> int:
    """Any integer -> a signed 32-bit seed. Host work."""
    seed &= 2**64 - 1
    low = (seed ^ (seed >> 32)) & (2**32 - 1)
    return low - 2**32 if low >= 2**31 else low


def top_logprobs(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logprobs: [R, V] -> ids: int32[R, k], values: [R, k], best first."""
    values, ids = torch.topk(logprobs, min(k, logprobs.shape[1]))
    return ids.to(torch.int32), values


def token_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """logprobs: [R, V], ids: int32[R] -> [R]: each row's logprob of its id."""
    return logprobs.gather(1, ids[:, None].to(torch.int64))[:, 0]
