"""Rows in the order of their groups, as a stable sort has them: by counting, in one launch where they are few and in two where they are many.

A block of rows is a program's. Where a row goes: behind the rows of all smaller groups, those of its own group in earlier blocks, and those of its group that come before it in
its block. A sort of PyTorch's, with what makes sizes of it, is some ten launches, which a decode step has in every layer with experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.tuning import Config, launch_options
from sglang_triton.turns import take_turn

MOST_GROUPS = 1022  # beyond, a program would hold too many counters: adapters times experts may be so many
BLOCK = 256  # rows of a program
CHUNK = tl.constexpr(32)  # rows that it looks at at once, and blocks whose counts it adds up


def by_group(group: Tensor, num_groups: int, lookup: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """group: int32[S], outside of [0, num_groups) for none -> the rows in order of their groups, those of none last: int32[S], and the sizes of the groups.

    With `lookup`, int32[n], group r is lookup[group[r]].
    """
    num_rows, device = group.shape[0], group.device
    if num_groups > MOST_GROUPS:
        return _sorted(group if lookup is None else lookup[group], num_groups)
    order = torch.empty(num_rows, dtype=torch.int32, device=device)
    sizes = torch.empty(num_groups, dtype=torch.int32, device=device)
    block = min(BLOCK, max(16, triton.next_power_of_2(num_rows)))
    blocks, bins = max(1, triton.cdiv(num_rows, block)), triton.next_power_of_2(num_groups + 2)
    form = {
        "X": num_groups,
        "HAS_LOOKUP": lookup is not None,
        "BINS": bins,
        "BLOCK": block,
        **_options(bins),
        **launch_options(),
    }
    lookup = group if lookup is None else lookup  # any pointer where it is not looked at, as for counts
    counts = sizes
    if blocks > 1:
        counts = torch.empty(blocks, bins, dtype=torch.int32, device=device)
        _count[(blocks,)](group, lookup, counts, num_rows, **form)
    _place[(blocks,)](group, lookup, counts, order, sizes, num_rows, blocks, SEVERAL=blocks > 1, **form)
    return order, sizes


def _options(bins: int) -> Config:
    return {"num_warps": 8 if bins > 256 else 4}


def _sorted(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    group = torch.where((group >= 0) & (group < num_groups), group, num_groups)
    order = torch.sort(group, stable=True).indices.to(torch.int32)
    sizes = torch.zeros(num_groups + 1, dtype=torch.int32, device=group.device)
    return order, sizes.scatter_add(0, group.long(), torch.ones_like(group, dtype=torch.int32))[:-1]


@triton.jit
def _group_of(group, lookup, row, S, X: tl.constexpr, HAS_LOOKUP: tl.constexpr):
    """Of each row; X: of none, X + 1: there is no such row."""
    real = row < S
    g = tl.load(group + row, real, other=0)
    if HAS_LOOKUP:
        g = tl.load(lookup + g, real, other=0)
    return tl.where(real, tl.where((g >= 0) & (g < X), g, X), X + 1).to(tl.int32)


@triton.jit
def _count(
    group, lookup, counts, S, X: tl.constexpr, HAS_LOOKUP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts: int32[blocks, BINS]."""
    take_turn()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(_group_of(group, lookup, row, S, X, HAS_LOOKUP), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), count)


@triton.jit
def _place(
    group, lookup, counts, order, sizes, S, blocks, SEVERAL: tl.constexpr, X: tl.constexpr, HAS_LOOKUP: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`SEVERAL`: blocks, whose counts are there."""
    take_turn()
    block, lane, each = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BINS)
    row = block * BLOCK + lane
    mine = _group_of(group, lookup, row, S, X, HAS_LOOKUP)
    before = tl.zeros([BINS], tl.int32)  # of earlier blocks
    if SEVERAL:
        size = tl.zeros([BINS], tl.int32)
        for first in range(0, blocks, CHUNK):
            other = first + tl.arange(0, CHUNK)[:, None]
            count = tl.load(counts + other * BINS + each[None, :], other < blocks, other=0)
            size += tl.sum(count, 0)
            before += tl.sum(tl.where(other < block, count, 0), 0)
    else:
        size = tl.histogram(mine, BINS)
    place = tl.gather(tl.cumsum(size, 0) - size + before, mine, 0)
    for first in range(0, BLOCK, CHUNK if BLOCK > CHUNK else BLOCK):
        there = first + tl.arange(0, CHUNK if BLOCK > CHUNK else BLOCK)
        theirs = _group_of(group, lookup, block * BLOCK + there, S, X, HAS_LOOKUP)
        ahead = (theirs[None, :] == mine[:, None]) & (there[None, :] < lane[:, None])
        place += tl.sum(ahead.to(tl.int32), 1)
    tl.store(order + place, row, row < S)
    if block == 0:
        tl.store(sizes + each, size, each < X)


def _spec(kernel: object, name: str, *, experts: int, block: int, several: bool) -> AotSpec:
    bins = triton.next_power_of_2(experts + 2)
    return AotSpec(
        op="moe.fused",
        name=name,
        kernel=kernel,
        signature=dict.fromkeys(("group", "lookup", "counts", "order", "sizes"), "*i32")
        | {"S": "i32", "blocks": "i32"},
        constexprs={"X": experts, "HAS_LOOKUP": True, "BINS": bins, "BLOCK": block, "SEVERAL": several},
        odd=("S", "blocks"),
        fixed=_options(bins),
    )


AOT = (
    _spec(_count, "rows of each expert", experts=256, block=BLOCK, several=True),
    _spec(_place, "rows by expert, S=32768", experts=256, block=BLOCK, several=True),
    _spec(_place, "rows by expert, S=8", experts=128, block=16, several=False),
)
