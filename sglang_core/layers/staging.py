"""Memory for large tensors that are put together, packed, and gone: a mapping each, so that it goes back when they do.

A C library keeps freed blocks of some megabytes for itself, and among blocks that stay it cannot always use them again: loading
could end up holding a third more than the weights. Fresh mappings cost page faults instead, few with huge pages (madvise(2)).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 1 << 20


def staging(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An undefined tensor of that shape, with the dtype and on the device of `like`."""
    num_bytes = torch.Size(shape).numel() * like.dtype.itemsize
    if num_bytes < LARGE or not like.is_cpu:
        return like.new_empty(*shape)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # forbidden by an administrator; unknown to this system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).view(*shape)
