"""Between host and device in few transfers, from and into memory that the device reaches by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes: kernels are compiled for tensors that begin at multiples of it
Pinned = Callable[[int], Tensor]  # as `DeviceDriver.pinned`


def one_transfer(arrays: Sequence[NDArray[Any]], device: torch.device, pinned: Pinned) -> list[Tensor]:
    """The arrays on the device, for what is put on the current stream from now on; the host does not wait.

    Of dtypes of four bytes, in any shape and stride. They share one allocation: each begins at a multiple of 16 bytes.
    """
    sizes = [
        n for x in arrays for n in (x.size, -x.size % (ALIGNMENT // 4))
    ]  # of each array, and of what fills up behind it
    host = pinned(4 * sum(sizes)).view(torch.int32)
    place, first = host.numpy(), 0
    for x, filling in zip(arrays, sizes[1::2], strict=True):
        place[first : first + x.size].view(x.dtype).reshape(x.shape)[...] = x
        first += x.size + filling
    parts = host.to(device, non_blocking=True).split_with_sizes(sizes)[::2]
    return [_as(x, part) for x, part in zip(arrays, parts, strict=True)]


def _as(x: NDArray[Any], words: Tensor) -> Tensor:
    """In the dtype and shape of `x`."""
    if x.dtype != np.int32:
        words = words.view(torch.from_numpy(x[:0]).dtype)
    return words if x.ndim == 1 else words.view(x.shape)


def to_pinned(x: Tensor, pinned: Pinned) -> Tensor:
    """A copy on the host, there once the work that the current stream has by now is done."""
    copy = pinned(x.numel() * x.element_size()).view(x.dtype).view(x.shape)
    return copy.copy_(x, non_blocking=True)
