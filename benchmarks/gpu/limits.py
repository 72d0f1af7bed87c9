"""What the device reaches itself, measured in the run whose figures are held against it."""

from __future__ import annotations

import torch

from benchmarks.gpu.opened import Opened
from benchmarks.gpu.session import Facts

COPIED, SIDE = 2 << 30, 8192  # bytes; rows and columns


def measure(opened: Opened) -> Facts:
    """`copy`: bytes read and written a second. `matmul`: bfloat16 operations a second, on random numbers: zeros are faster."""
    size, side = (1 << 20, 256) if opened.small else (COPIED, SIDE)
    with torch.inference_mode():
        x = torch.randn(size // 2, device=opened.device).bfloat16()
        y = torch.empty_like(x)
        copy = 2 * size / opened.seconds(lambda: y.copy_(x))
        a, b = (torch.randn(side, side, device=opened.device).bfloat16() for _ in range(2))
        matmul = 2 * side**3 / opened.seconds(lambda: torch.matmul(a, b))
    return {"copy": copy, "matmul": matmul}
