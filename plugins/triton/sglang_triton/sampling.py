"""sample.sample without sorting the vocabulary: each row is cut into chunks, which are surveyed side by side.

A draw inverts the cumulative distribution: the survey has left the mass of every chunk, so one program a row finds the chunk
that the row's number falls into, and looks at that chunk alone. Logits are read once.

With filters, the last value that top-k or top-p keeps is found first, four bits at a time from the highest (a radix select on the
bits of float32, in an order that integers compare): `_weigh` weighs the tokens under each of the 16 next digits, by count for
top-k and by mass for top-p, and `_decide` keeps the digit under which the weight reaches its goal. Eight such steps know
the value to the last bit. No atomics: sums are made in a fixed order, and a step that is run twice gives the same bits. Chunks
depend on the vocabulary alone, so a row's draw does not depend on its neighbours. Where no row keeps more than a few tokens, `sampling_few` finds the
same value in two steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_core.api.ops import SampleParams
from sglang_triton.aot_spec import AotSpec
from sglang_triton.numerics import widen
from sglang_triton.rows import dense_last
from sglang_triton.sampling_few import AOT as FEW_AOT
from sglang_triton.sampling_few import FEW, cut_of_few, peak_room
from sglang_triton.sampling_tile import (
    GREEDY_BELOW,
    best,
    chunk_of,
    cooled,
    falls_into,
    filtered,
    is_wanted,
    mass_of,
    ordered,
    partials,
    row_top,
    store_peaks,
    uniform,
    warmth,
)
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

DIGIT_BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
SHIFTS = tuple(range(28, -1, -4))  # of the digit that each step decides


def sample(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
    """logits: [R, V] -> ids: int32[R], logprobs: float32[R, V] or None."""
    logits = dense_last(logits)
    rows, vocab = logits.shape
    device = logits.device
    ids = torch.empty(rows, dtype=torch.int32, device=device)
    found = torch.empty(rows, vocab, dtype=torch.float32, device=device) if logprobs else None
    if rows == 0:
        return ids, found
    config = choose("sample.sample", R=rows, V=vocab)
    chunks = triton.cdiv(vocab, config["CHUNK"])
    over_rows = (triton.cdiv(rows, config["BLOCK_R"]),)
    over_chunks = (*over_rows, chunks)
    shape = {"R": rows, "V": vocab, "stride": logits.stride(0)}
    partial = {"BLOCK_S": triton.next_power_of_2(chunks), **config}
    top, total, mass = torch.empty(3, rows, chunks, dtype=torch.float32, device=device)
    first = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    drawn = not params.all_greedy and not params.needs_filter  # else masses are of what filters leave
    few = not params.all_greedy and params.needs_filter and 0 < params.max_top_k <= FEW
    peaks = peak_room(logits, chunks, config["CHUNK"]) if few else top  # any pointer: it is not looked at
    _survey[over_chunks](
        logits, params.temperature, top, first, total, mass, peaks, **shape,
        DRAW=drawn, TOTAL=logprobs, PEAKS=few, **config,
    )  # fmt: skip
    if found is not None:
        _logprobs[over_chunks](logits, top, total, found, **shape, **partial)
    if params.all_greedy:
        _greedy[over_rows](top, first, ids, rows, vocab, chunks, **partial)
        return ids, found
    cut, room, equal = top, top, first  # any pointers: without a filter they are not looked at
    if params.needs_filter:
        if few:
            cut, room = cut_of_few(logits, params, peaks, top, partial)
        else:
            cut, room = _find_cut(logits, params, top, chunks, over_rows, over_chunks, partial)
        equal = torch.empty_like(first)
        _tally[over_chunks](logits, params.temperature, params.min_p, top, cut, mass, equal, **shape, **partial)
    _pick[over_rows](
        logits,
        params.temperature,
        params.min_p,
        params.seeds,
        params.positions,
        top,
        first,
        mass,
        cut,
        room,
        equal,
        ids,
        **shape,
        FILTER=params.needs_filter,
        **partial,
    )
    return ids, found


def _find_cut(
    logits: Tensor,
    params: SampleParams,
    top: Tensor,
    chunks: int,
    over_rows: tuple[int, ...],
    over_chunks: tuple[int, ...],
    partial: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """The key of the last value that top-k and top-p keep, int32[R] (bits of a uint32), and how many that equal it: float32[R]."""
    rows, vocab = logits.shape
    weight = torch.empty(rows, chunks, DIGITS.value, dtype=torch.float32, device=logits.device)
    prefix, cut = torch.empty(2, rows, dtype=torch.int32, device=logits.device)
    above, goal, room, surplus = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    for by_mass in (False, True):
        for shift in SHIFTS:
            _weigh[over_chunks](
                logits,
                params.temperature,
                params.top_k,
                params.top_p,
                top,
                prefix,
                cut,
                weight,
                rows,
                vocab,
                logits.stride(0),
                shift,
                BY_MASS=by_mass,
                **partial,
            )
            _decide[over_rows](
                params.temperature,
                params.top_k,
                params.top_p,
                top,
                weight,
                prefix,
                above,
                goal,
                cut,
                room,
                surplus,
                rows,
                vocab,
                chunks,
                shift,
                BY_MASS=by_mass,
                **partial,
            )
    return cut, room


@triton.jit
def _survey(
    logits,
    temperature,
    top,
    first,
    total,
    mass,
    peaks,
    R,
    V,
    stride,
    DRAW: tl.constexpr,
    TOTAL: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each chunk: its largest logit, the first token that has it, and the mass relative to that one, at temperatures 1 and its own. Of
    each group of GROUP tokens in it: the largest logit.
    """
    take_turn()
    row, there, token, x = chunk_of(logits, tl.program_id(1), R, V, stride, BLOCK_R, CHUNK)
    most = tl.max(x, axis=1)
    finite = tl.where(most == float("-inf"), 0.0, most)[:, None]
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(top + at, most, there)
    tl.store(first + at, tl.min(tl.where(x == most[:, None], token[None, :], V - 1), axis=1), there)
    if TOTAL:
        tl.store(total + at, tl.sum(tl.exp(x - finite), axis=1), there)
    if PEAKS:
        store_peaks(peaks, x, row, there, BLOCK_R, CHUNK)
    if DRAW:
        warm = warmth(temperature, row, there)[:, None]
        tl.store(
            mass + at,
            tl.sum(tl.exp((x - finite) * tl.div_rn(tl.full(warm.shape, 1.0, tl.float32), warm)), axis=1),
            there,
        )


@triton.jit
def _greedy(top, first, ids, R, V, S, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr):
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    tl.store(ids + row, best(top, first, row, row < R, V, S, BLOCK_S), row < R)


@triton.jit
def _logprobs(logits, top, total, out, R, V, stride, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr):
    take_turn()
    row, there, token, x = chunk_of(logits, tl.program_id(1), R, V, stride, BLOCK_R, CHUNK)
    S = tl.num_programs(1)
    tops, at, inside = partials(top, row, there, S, BLOCK_S, float("-inf"))
    most = tl.max(tops, axis=1)
    shares = tl.load(total + at, inside, other=0.0) * tl.exp(tops - most[:, None])
    normaliser = most + tl.log(tl.sum(shares, axis=1))
    tl.store(out + row[:, None] * V + token[None, :], x - normaliser[:, None], there[:, None] & (token < V)[None, :])


@triton.jit(do_not_specialize=["shift"])
def _weigh(
    logits,
    temperature,
    top_k,
    top_p,
    top,
    prefix,
    cut,
    weight,
    R,
    V,
    stride,
    shift,
    BY_MASS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """weight: float32[R, S, 16], of the chunk's tokens whose key begins as decided, by their next digit."""
    take_turn()
    row, there, token, x = chunk_of(logits, tl.program_id(1), R, V, stride, BLOCK_R, CHUNK)
    wanted = is_wanted(top_k, top_p, row, there, V, BY_MASS)
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        warm = warmth(temperature, row, there)[:, None]
        scaled = cooled(x, warm)
        key = ordered(scaled)
        begins = tl.load(prefix + row, wanted, other=0).to(tl.uint32, bitcast=True)[:, None]
        counts = (wanted[:, None] & (token < V)[None, :]) & (((key ^ begins) >> shift) >> DIGIT_BITS == 0)
        if BY_MASS:
            peak = row_top(top, row, there, tl.num_programs(1), BLOCK_S)[:, None]
            least = tl.load(cut + row, wanted, other=0).to(tl.uint32, bitcast=True)[:, None]
            value = tl.where(counts & (key >= least), tl.exp(scaled - tl.div_rn(peak, warm)), 0.0)
        else:
            value = tl.where(counts, 1.0, 0.0)
        digit = (key >> shift) & (DIGITS - 1)
        at = weight + (row * tl.num_programs(1) + tl.program_id(1)) * DIGITS
        for j in tl.static_range(DIGITS):
            tl.store(at + j, tl.sum(tl.where(digit == j, value, 0.0), axis=1), wanted)


@triton.jit(do_not_specialize=["shift"])
def _decide(
    temperature,
    top_k,
    top_p,
    top,
    weight,
    prefix,
    above,
    goal,
    cut,
    room,
    surplus,
    R,
    V,
    S,
    shift,
    BY_MASS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One more digit of the key of the last token that is kept: the highest at which the weight of it and all above reaches the goal.

    `above`: the weight of what is above all keys that begin so. After the last digit: `cut`, the whole key, and `room`, how
    many tokens of that key are kept. `surplus`: of that key, those that top-k leaves out, which top-p then does not count.
    """
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    wanted = is_wanted(top_k, top_p, row, there, V, BY_MASS)
    chunk = tl.arange(0, BLOCK_S)
    digit = tl.arange(0, DIGITS)[None, :]
    at = (row[:, None, None] * S + chunk[None, :, None]) * DIGITS + digit[:, None, :]
    inside = wanted[:, None, None] & (chunk < S)[None, :, None]
    here = tl.sum(tl.load(weight + at, inside, other=0.0), axis=1)

    begin = shift == 28  # of the first step: nothing is decided yet, and memory holds anything
    key = tl.where(begin, 0, tl.load(prefix + row, wanted, other=0)).to(tl.uint32, bitcast=True)
    passed = tl.where(begin, 0.0, tl.load(above + row, wanted, other=0.0))
    if BY_MASS:
        warm = warmth(temperature, row, there)
        peak = tl.div_rn(row_top(top, row, there, S, BLOCK_S), warm)
        old_cut = tl.load(cut + row, there, other=0).to(tl.uint32, bitcast=True)
        extra = tl.load(surplus + row, there, other=0.0)
        extra = tl.where(extra > 0, extra * mass_of(old_cut, peak), 0.0)  # without top-k the cut is no number
        start = tl.load(top_p + row, there, other=1.0) * (tl.sum(here, axis=1) - extra)
    else:
        start = tl.load(top_k + row, there, other=1).to(tl.float32)
    wish = tl.where(begin, start, tl.load(goal + row, wanted, other=0.0))

    reached = passed[:, None] + tl.cumsum(here, axis=1, reverse=True) >= wish[:, None]
    chosen = tl.max(tl.where(reached, digit, -1), axis=1)
    # Sums in another order may miss the goal by a rounding: then everything is kept.
    lowest = tl.min(tl.where(here > 0, digit, DIGITS - 1), axis=1)
    chosen = tl.where(chosen < 0, lowest, chosen)
    passed += tl.sum(tl.where(digit > chosen[:, None], here, 0.0), axis=1)
    key = key | (chosen.to(tl.uint32) << shift)
    tl.store(prefix + row, key.to(tl.int32, bitcast=True), wanted)
    tl.store(above + row, passed, wanted)
    tl.store(goal + row, wish, wanted)
    if shift == 0:
        equal = tl.sum(tl.where(digit == chosen[:, None], here, 0.0), axis=1)
        if BY_MASS:
            each = mass_of(key, peak)
            kept = tl.where(each > 0, tl.ceil((wish - passed) / each), 1.0)
            old_room = tl.load(room + row, there, other=0.0)
            kept = tl.where(key == old_cut, tl.minimum(kept, old_room), kept)
            tl.store(cut + row, key.to(tl.int32, bitcast=True), wanted)
            tl.store(room + row, tl.maximum(kept, 1.0), wanted)
        else:
            kept = wish - passed
            tl.store(cut + row, tl.where(wanted, key, 0).to(tl.int32, bitcast=True), there)
            tl.store(room + row, tl.where(wanted, kept, 0.0), there)
            tl.store(surplus + row, tl.where(wanted, equal - kept, 0.0), there)


@triton.jit
def _tally(
    logits,
    temperature,
    min_p,
    top,
    cut,
    mass,
    equal,
    R,
    V,
    stride,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each chunk: the mass of what is above the cut, relative to the row's largest, and how many tokens are at it."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    S = tl.num_programs(1)
    at = row * S + tl.program_id(1)
    last = tl.load(cut + row, there, other=0).to(tl.uint32, bitcast=True)
    highest = ordered(cooled(tl.load(top + at, there, other=float("-inf")), warmth(temperature, row, there)))
    if tl.max((there & (highest >= last)).to(tl.int32), axis=0) > 0:
        row, there, token, x = chunk_of(logits, tl.program_id(1), R, V, stride, BLOCK_R, CHUNK)
        peak = row_top(top, row, there, S, BLOCK_S)
        key, value = filtered(x, temperature, min_p, peak, row, there)
        valid = (token < V)[None, :]
        tl.store(mass + at, tl.sum(tl.where(valid & (key > last[:, None]), value, 0.0), axis=1), there)
        tl.store(equal + at, tl.sum((valid & (key == last[:, None])).to(tl.int32), axis=1), there)
    else:  # nothing of it is kept: its logits are not read
        tl.store(mass + at, tl.zeros([BLOCK_R], tl.float32), there)
        tl.store(equal + at, tl.zeros([BLOCK_R], tl.int32), there)


@triton.jit
def _pick(
    logits,
    temperature,
    min_p,
    seeds,
    positions,
    top,
    first,
    mass,
    cut,
    room,
    equal,
    ids,
    R,
    V,
    stride,
    FILTER: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Where the row's number falls: the chunk by the masses of chunks, then the token in it."""
    take_turn()
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    there = row < R
    S = (V + CHUNK - 1) // CHUNK
    warm = warmth(temperature, row, there)
    tops, at, inside = partials(top, row, there, S, BLOCK_S, float("-inf"))
    peak = tl.max(tops, axis=1)
    masses = tl.load(mass + at, inside, other=0.0)
    chunk = tl.arange(0, BLOCK_S)[None, :]
    if FILTER:
        # Of tokens that equal the last one kept, those with the lowest ids: as many as there is room for.
        last = tl.load(cut + row, there, other=0).to(tl.uint32, bitcast=True)
        left = tl.load(room + row, there, other=0.0).to(tl.int32)
        equals = tl.load(equal + at, inside, other=0)
        before = tl.cumsum(equals, axis=1) - equals
        each = mass_of(last, tl.div_rn(peak, warm))
        each = tl.where(each >= tl.load(min_p + row, there, other=0.0), each, 0.0)
        at_cut = tl.minimum(tl.maximum(left[:, None] - before, 0), equals)
        masses += tl.where(at_cut > 0, at_cut.to(tl.float32) * each[:, None], 0.0)
    else:
        finite = tl.where(tops == float("-inf"), 0.0, tops)
        factor = tl.exp(tl.div_rn(finite, warm[:, None]) - tl.div_rn(peak, warm)[:, None])
        masses = tl.where(tops == float("-inf"), 0.0, masses * factor)
    target = uniform(seeds, positions, row, there) * tl.sum(masses, axis=1)
    mine, behind = falls_into(masses, chunk, target)

    picked = tl.arange(0, CHUNK)[None, :]
    token = mine[:, None] * CHUNK + picked
    x = widen(tl.load(logits + row[:, None] * stride + token, there[:, None] & (token < V), other=float("-inf")))
    key, value = filtered(x, temperature, min_p, peak, row, there)
    if FILTER:
        taken = tl.sum(tl.where(chunk == mine[:, None], before, 0), axis=1)
        at_cut = (key == last[:, None]) & (token < V)
        rank = taken[:, None] + tl.cumsum(at_cut.to(tl.int32), axis=1)
        keeps = (key > last[:, None]) | (at_cut & (rank <= left[:, None]))
        value = tl.where(keeps & (token < V), value, 0.0)
    else:
        value = tl.where(token < V, tl.exp(cooled(x, warm[:, None]) - tl.div_rn(peak, warm)[:, None]), 0.0)
    place, _ = falls_into(value, picked, target - behind)
    drawn = tl.minimum(mine * CHUNK + place, V - 1)
    cold = tl.load(temperature + row, there, other=1.0) < GREEDY_BELOW
    tl.store(ids + row, tl.where(cold, best(top, first, row, there, V, S, BLOCK_S), drawn), there)


_VOCAB = 151_936
STREAMED = ("survey", "logprobs", "weigh", "tally")  # the kernels that go over all logits
_SHAPE = {"R": "i32", "V": "i32", "stride": "i32"}
_TYPES = {
    "fp32": (
        "logits",
        "temperature",
        "min_p",
        "top_p",
        "top",
        "total",
        "mass",
        "weight",
        "above",
        "goal",
        "room",
        "surplus",
        "out",
        "peaks",
    ),
    "i32": ("seeds", "positions", "top_k", "first", "equal", "ids", "prefix", "cut"),
}
_POINTERS = {name: f"*{dtype}" for dtype, names in _TYPES.items() for name in names}


def _spec(kernel: object, name: str, **constexprs: object) -> AotSpec:
    block = {} if name in ("survey",) else {"BLOCK_S": 64}
    return AotSpec(
        op="sample.sample",
        name=", ".join([name, *(key.lower() for key, value in constexprs.items() if value is True)]),
        kernel=kernel,
        signature=_POINTERS | _SHAPE | {"S": "i32", "shift": "i32"},
        constexprs=constexprs | block,
        sizes={"R": 64, "V": _VOCAB},
        odd=("R", "S", "shift"),
        instructions={"sm_": "ld.global.v4", "gfx9": "global_load_dwordx4"} if name in STREAMED else {},
    )


AOT = (
    _spec(_survey, "survey", DRAW=False, TOTAL=False, PEAKS=False),
    _spec(_survey, "survey", DRAW=True, TOTAL=True, PEAKS=False),
    _spec(_survey, "survey", DRAW=False, TOTAL=False, PEAKS=True),
    _spec(_greedy, "greedy"),
    _spec(_logprobs, "logprobs"),
    _spec(_weigh, "weigh", BY_MASS=False),
    _spec(_weigh, "weigh", BY_MASS=True),
    _spec(_decide, "decide", BY_MASS=False),
    _spec(_decide, "decide", BY_MASS=True),
    _spec(_tally, "tally"),
    _spec(_pick, "pick", FILTER=False),
    _spec(_pick, "pick", FILTER=True),
    *FEW_AOT,
)
