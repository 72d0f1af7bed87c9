"""Huge pages for what every step reads from end to end: packed weights, and the pools of keys and values.

With pages of 4 KiB a core that streams memory waits for address translation, on virtual machines twice over. Linux gives pages of 2 MiB
where it is asked to before memory is first written (madvise(2), MADV_HUGEPAGE), unless an administrator has forbidden it
(/sys/kernel/mm/transparent_hugepage/enabled): then everything works, on small pages.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

SIZE = 2 * 2**20
_HUGEPAGE = mmap.MADV_HUGEPAGE
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(num_bytes: int) -> Tensor:
    """uint8[num_bytes], undefined. Memory of its own: what an allocator hands out again has its small pages already."""
    if num_bytes < SIZE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def advise(x: Tensor) -> None:
    """Ask for x, which is large and has not been written yet."""
    start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length >= SIZE:
        _madvise(start, length, _HUGEPAGE)
