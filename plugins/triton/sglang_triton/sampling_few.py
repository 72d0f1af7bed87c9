"""The last value that top-k and top-p keep, where no row keeps more than FEW tokens: out of a few groups of tokens, in two steps.

The survey leaves the largest logit of each group. No more than FEW - 1 groups have a larger one than the FEW-th largest of those, and in them is all
that is larger; what equals it is in groups whose largest it is, of which as many as FEW are enough. So `_gather` names at most 2 FEW groups,
whatever the logits are, and `_cut` looks at their tokens alone. Both search bit by bit for the largest key that enough is above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import SampleParams
from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import widen
from sglang_triton.sampling_tile import GROUP, cooled, mass_of, ordered, row_top, warmth
from sglang_triton.turns import take_turn

FEW = 64
MOST_ROWS = 16  # of a program: each has 8,192 tokens, and a tensor at most 2^20
_FEW = tl.constexpr(FEW)


def peak_room(logits: Tensor, chunks: int, chunk: int) -> Tensor:
    """float32[R, groups], for the survey to fill."""
    return torch.empty(logits.shape[0], chunks * chunk // GROUP.value, dtype=torch.float32, device=logits.device)


def cut_of_few(
    logits: Tensor, params: SampleParams, peaks: Tensor, top: Tensor, partial: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """The key of the last value that top-k and top-p keep, int32[R] (bits of a uint32), and how many that equal it: float32[R]."""
    rows, vocab = logits.shape
    groups = torch.empty(rows, 2 * FEW, dtype=torch.int32, device=logits.device)
    cut = torch.empty(rows, dtype=torch.int32, device=logits.device)
    room = torch.empty(rows, dtype=torch.float32, device=logits.device)
    filters = (params.temperature, params.top_k, params.top_p)
    count = peaks.shape[1]
    config = partial | {"BLOCK_R": min(partial["BLOCK_R"], MOST_ROWS)}
    grid = (triton.cdiv(rows, config["BLOCK_R"]),)
    _gather[grid](peaks, *filters, groups, rows, vocab, count, BLOCK_P=triton.next_power_of_2(count), **config)
    _cut[grid](logits, *filters, top, groups, cut, room, rows, vocab, top.shape[1], logits.stride(0), **config)
    return cut, room


@triton.jit
def _gather(
    peaks,
    temperature,
    top_k,
    top_p,
    groups,
    R,
    V,
    P,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """groups: int32[R, 2 FEW], of rows that are filtered: those that hold all that top-k may keep, in order; -1 where there are no more."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    wanted = is_filtered(top_k, top_p, row, there, V)
    group = tl.arange(0, BLOCK_P)[None, :]
    real = wanted[:, None] & (group < P)
    peak = tl.load(peaks + row[:, None] * P + group, real, other=float("-inf"))
    key = tl.where(real, ordered(cooled(peak, warmth(temperature, row, there)[:, None])), 0)  # below that of any value
    least = largest(key, tl.full([BLOCK_R], _FEW, tl.int32))[:, None]
    equal = ((key == least) & real).to(tl.int32)
    taken = ((key > least) | ((equal > 0) & (tl.cumsum(equal, axis=1) <= _FEW))).to(tl.int32)
    to = groups + row[:, None] * (2 * _FEW)
    tl.store(to + tl.cumsum(taken, axis=1) - 1, group.broadcast_to([BLOCK_R, BLOCK_P]), real & (taken > 0))
    slot = tl.arange(0, 2 * _FEW)[None, :]
    tl.store(
        to + slot, tl.full([BLOCK_R, 2 * _FEW], -1, tl.int32), there[:, None] & (slot >= tl.sum(taken, axis=1)[:, None])
    )


@triton.jit
def _cut(
    logits,
    temperature,
    top_k,
    top_p,
    top,
    groups,
    cut,
    room,
    R,
    V,
    S,
    stride,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of the tokens of each row's groups: top-k by count, then top-p by mass of what that leaves."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    wanted = is_filtered(top_k, top_p, row, there, V)
    group = tl.load(groups + row[:, None] * (2 * _FEW) + tl.arange(0, 2 * _FEW)[None, :], wanted[:, None], other=-1)
    token = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    real = (group >= 0)[:, :, None] & (token < V)
    x = widen(tl.load(logits + row[:, None, None] * stride + token, real, other=float("-inf")))
    warm = warmth(temperature, row, there)
    scaled = tl.reshape(cooled(x, warm[:, None, None]), [BLOCK_R, 2 * _FEW * GROUP])
    key = tl.where(tl.reshape(real, scaled.shape), ordered(scaled), 0)

    count = tl.minimum(tl.load(top_k + row, wanted, other=1), V)
    last = largest(key, count)
    above = key > last[:, None]
    kept = (count - tl.sum(above.to(tl.int32), axis=1)).to(tl.float32)

    peak = tl.div_rn(row_top(top, row, there, S, BLOCK_S), warm)
    mass = tl.where(above, tl.exp(scaled - peak[:, None]), 0.0)
    at_last = kept * mass_of(last, peak)
    share = tl.load(top_p + row, wanted, other=1.0)
    goal = share * (tl.sum(mass, axis=1) + at_last)
    end = tl.zeros([BLOCK_R], tl.uint32)
    bit = tl.full([BLOCK_R], 0x80000000, tl.uint32)
    for _ in range(32):
        tried = end | bit
        reached = tl.sum(tl.where(key >= tried[:, None], mass, 0.0), axis=1) + tl.where(tried <= last, at_last, 0.0)
        end = tl.where(reached >= goal, tried, end)
        bit = bit >> 1
    end = tl.maximum(tl.minimum(end, tl.max(key, axis=1)), last)  # one token, whatever the share
    each = mass_of(end, peak)
    missing = goal - tl.sum(tl.where(key > end[:, None], mass, 0.0), axis=1)
    of_end = tl.where(each > 0, tl.ceil(missing / each), 1.0)
    of_end = tl.maximum(tl.where(end == last, tl.minimum(of_end, kept), of_end), 1.0)
    by_mass = share < 1.0
    tl.store(cut + row, tl.where(wanted, tl.where(by_mass, end, last), 0).to(tl.int32, bitcast=True), there)
    tl.store(room + row, tl.where(wanted, tl.where(by_mass, of_end, kept), 0.0), there)


@triton.jit
def is_filtered(top_k, top_p, row, there, V):
    """Which rows have a top-k or a top-p that leaves out anything."""
    return there & ((tl.load(top_k + row, there, other=V) < V) | (tl.load(top_p + row, there, other=1.0) < 1.0))


@triton.jit
def largest(key, count):
    """key: uint32[BLOCK_R, N], count: int32[BLOCK_R] -> uint32[BLOCK_R]: the key that `count` of the row reach; 0 where there are not so many."""
    found = tl.zeros(count.shape, tl.uint32)
    bit = tl.full(count.shape, 0x80000000, tl.uint32)
    for _ in range(32):
        tried = found | bit
        found = tl.where(tl.sum((key >= tried[:, None]).to(tl.int32), axis=1) >= count, tried, found)
        bit = bit >> 1
    return found


_TYPES = {
    "logits": "*fp32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "top": "*fp32", "peaks": "*fp32", "groups": "*i32",
    "cut": "*i32", "room": "*fp32", **dict.fromkeys(("R", "V", "P", "S", "stride"), "i32"),
}  # fmt: skip
AOT = tuple(
    AotSpec(
        op="sample.sample",
        name=name,
        kernel=kernel,
        signature=_TYPES,
        constexprs={"BLOCK_S": 64, "BLOCK_P": 4096},
        sizes={"R": 64, "V": 151_936},
        odd=("R", "S"),
    )
    for name, kernel in (("gather", _gather), ("cut", _cut))
)
