"""`SharedMemory`: memory for sets of tensors of which only one set is in use at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN = 256  # bytes: as allocators align, so that kernels may load wide


class SharedMemory:
    """Of each dtype on each device as much as the largest set so far. A larger one gets new memory; what was given before stays where it is."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same devices, shapes, dtypes and, where they have no gaps, strides. Their values are undefined."""
        starts, ends = [], defaultdict[tuple[torch.device, torch.dtype], int](int)
        for x in given:
            starts.append(ends[x.device, x.dtype])
            step = ALIGN // x.element_size()
            ends[x.device, x.dtype] += -(-x.numel() // step) * step
        for (device, dtype), size in ends.items():
            held = self._held.get((device, dtype))
            if held is None or held.numel() < size:
                self._held[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return [
            self._held[x.device, x.dtype].as_strided(x.shape, torch.empty_like(x, device="meta").stride(), start)
            for x, start in zip(given, starts, strict=True)
        ]
