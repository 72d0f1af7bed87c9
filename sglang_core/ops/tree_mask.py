"""Tree masks: which of a step's own tokens each of them sees, when a tree of drafts is verified in one step.

A mask is int32[T, W]: bit j % 32 of word j // 32 of a token's row says that it sees token j of its own req's new tokens. It is a
tree in order: parents come before children, and a token sees itself and what its parent sees. So the bits of a row are the path
from a root, its depth is their number less 1, and its position is prefix_len + depth: what rotary embedding is given, and what a
window counts by. The prefix is seen by all. A req that verifies nothing has a chain. Rows of padding are zeros.

Bits, because a mask of T x Q bytes is copied to the device in every step; words of 32, because every device shifts int32; W is
ceil(Q / 32), so that it is static in a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]
BITS = 32  # of a word


def tree_words(max_extend: int) -> int:
    """W."""
    return -(-max_extend // BITS)


def tree_mask_of(parents: Sequence[Sequence[int]], max_extend: int = 0) -> Tensor:
    """parents: of each req's new tokens in order, the index of each one's parent among them, -1 for a root -> int32[T, W].

    Raises ValueError where a parent does not come before its child.
    """
    longest = max([max_extend, *map(len, parents)])
    paths = np.zeros((sum(map(len, parents)), tree_words(longest) * BITS), np.bool_)
    first = 0
    for of_req in parents:
        for i, parent in enumerate(of_req):
            if not -1 <= parent < i:
                raise ValueError(f"token {i} of a tree has parent {parent}; it must be -1 or one of the {i} before it")
            if parent >= 0:
                paths[first + i] = paths[first + parent]
            paths[first + i, i] = True
        first += len(of_req)
    return torch.from_numpy(pack_bits(paths))


def pack_bits(paths: Bools) -> Ints:
    """bool[T, 32 W] -> int32[T, W], the first column in the lowest bit."""
    words: Ints = np.packbits(paths, axis=-1, bitorder="little").view("<i4").astype(np.int32)
    return words


def unpack_bits(words: Ints) -> Bools:
    """The inverse of `pack_bits`."""
    return np.unpackbits(words.astype("<i4").view(np.uint8), axis=-1, bitorder="little").view(np.bool_)


def within_window(words: Ints, window: int, cu_extend: Ints) -> tuple[Ints, Ints, Ints]:
    """-> the mask without own tokens that are out of each one's window, int32[T, W]; each token's depth, and its first bit: int32[T].

    words: int32[T, W], cu_extend: int32[R + 1]. A token at depth d sees depths in (d - window, d].
    """
    paths = unpack_bits(words)
    depth = np.maximum(paths.sum(1, dtype=np.int32) - 1, 0)
    if int(depth.max(initial=0)) >= window:
        start = np.zeros(len(words), np.int32)
        start[: cu_extend[-1]] = np.repeat(cu_extend[:-1], np.diff(cu_extend))
        own = np.minimum(start[:, None] + np.arange(paths.shape[1], dtype=np.int32), len(words) - 1)
        paths &= depth[own] > depth[:, None] - window
    return pack_bits(paths), depth, paths.argmax(1).astype(np.int32)


def on_path(words: Tensor, offset: Tensor) -> Tensor:
    """Is a key on a query's path? words: int32[B, L, W], offset: int32[B, S] of keys from the end of the prefix -> bool[B, L, S].

    True in the prefix, where offset < 0. Not to be looked at past the last word.
    """
    offset = offset[:, None].expand(-1, words.shape[1], -1)
    word = words.gather(2, (offset // BITS).clamp(0, words.shape[2] - 1).long())
    return (offset < 0) | ((word >> (offset % BITS)) & 1 == 1)
