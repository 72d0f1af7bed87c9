"""Rows of many tensors at once: pages, slots and states of all layers, gathered into one buffer or scattered out of it by one launch.

Tensors are known by a table of addresses on the device, so that how many layers there are costs programs and not launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_triton.aot_spec import AotSpec
from sglang_triton.tuning import choose
from sglang_triton.turns import take_turn

ALIGNMENT = 16  # bytes: each tensor's rows begin at a multiple of so many in the buffer


class Rows:
    """`leaves`: dense tensors on one device, that stay where they are; a row is what one index of the first dim selects."""

    def __init__(self, leaves: list[Tensor]) -> None:
        assert all(leaf.is_contiguous() for leaf in leaves), "rows of a tensor that is not dense"
        self._leaves = leaves
        self._bytes = [leaf[0].numel() * leaf.element_size() for leaf in leaves]
        self._word = torch.int32 if all(n % 4 == 0 for n in self._bytes) else torch.uint8
        device = leaves[0].device
        self._addresses = torch.tensor([leaf.data_ptr() for leaf in leaves], dtype=torch.int64, device=device)
        words = [n // self._word.itemsize for n in self._bytes]
        self._longest = max(words)
        self._words = torch.tensor(words, dtype=torch.int64, device=device)
        # In a buffer of one row; of n rows, a leaf begins at n times that.
        starts = [0]
        for n in self._bytes:
            starts.append(starts[-1] + triton.cdiv(n, ALIGNMENT) * ALIGNMENT)
        *self._starts, self._total = starts
        self._first = torch.tensor(self._starts, dtype=torch.int64, device=device) // self._word.itemsize

    def gather(self, index: Tensor) -> Tensor:
        """index: int32[n] -> uint8[n * bytes of a row of all leaves]: see `parts`."""
        staged = torch.empty(index.shape[0] * self._total, dtype=torch.uint8, device=index.device)
        self._copy(index, staged, out=False)
        return staged

    def scatter(self, index: Tensor, staged: Tensor) -> None:
        """The inverse of `gather`. Rows that repeat get one of what is given for them."""
        self._copy(index, staged, out=True)

    def parts(self, staged: Tensor) -> tuple[Tensor, ...]:
        """What was gathered, leaf by leaf: [n, ...] of its dtype; views of `staged`, wherever that is now."""
        count = staged.shape[0] // self._total
        return tuple(
            staged[count * start : count * (start + size)].view(leaf.dtype).view(count, *leaf.shape[1:])
            for leaf, start, size in zip(self._leaves, self._starts, self._bytes, strict=True)
        )

    def joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The inverse of `parts`, on the host."""
        staged = torch.empty(parts[0].shape[0] * self._total, dtype=torch.uint8, device="cpu")
        for own, part in zip(self.parts(staged), parts, strict=True):
            own.copy_(part)
        return staged

    def _copy(self, index: Tensor, staged: Tensor, *, out: bool) -> None:
        count = index.shape[0]
        if count == 0:
            return
        config = choose("pool.rows")
        grid = (count, len(self._leaves), triton.cdiv(self._longest, config["BLOCK"]))
        staged = staged.view(self._word)
        _rows[grid](self._addresses, self._words, self._first, index, staged, count, OUT=out, **config)


@triton.jit
def _rows(addresses, words, first, index, staged, N, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK words of a row of one leaf."""
    take_turn()
    row, leaf = tl.program_id(0), tl.program_id(1)
    length = tl.load(words + leaf)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = word < length
    base = tl.load(addresses + leaf).to(tl.pointer_type(staged.dtype.element_ty))
    own = base + tl.load(index + row).to(tl.int64) * length + word
    other = staged + tl.load(first + leaf) * N + row * length + word
    if OUT:
        tl.store(own, tl.load(other, there, other=0), there)
    else:
        tl.store(other, tl.load(own, there, other=0), there)


AOT = tuple(
    AotSpec(
        op="pool.rows",
        name=name,
        kernel=_rows,
        signature={
            **dict.fromkeys(("addresses", "words", "first"), "*i64"),
            **{"index": "*i32", "staged": "*i32", "N": "i32"},
        },
        constexprs={"OUT": name == "scatter"},
        odd=("N",),
    )
    for name in ("gather", "scatter")
)
