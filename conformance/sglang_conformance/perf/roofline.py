"""What the device reaches itself, in this run: bytes a second and operations a second, through its tensors and its own kernels.

Of each probe the best sample counts: what the device can do does not sink with who else uses it.

Williams, Waterman and Patterson's roofline: no call is shorter than its bytes at the one rate or its operations at the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sglang_conformance.env import Op
from sglang_conformance.perf.clock import seconds_a_call
from sglang_conformance.perf.load import RING_BYTES, PerfEnv, Weights

PROBE_SECONDS = 0.6  # each
LARGEST, SMALLEST = 8192, 1024  # sides of the matrices that are multiplied
STREAMED = 4096  # side of the weights that one row streams
LONG_ENOUGH = 0.02  # seconds of a product that shows the rate


def bandwidth(env: PerfEnv, synchronize: Callable[[], None]) -> dict[str, float]:
    """Bytes a second of a copy, of a sum, and of the linear kernel on one row, over memory that no cache holds."""
    x = torch.ones(RING_BYTES // 4, dtype=torch.float32, device=env.device)
    y = torch.empty_like(x)
    time = partial(seconds_a_call, synchronize=synchronize, budget=PROBE_SECONDS, of=min)
    (weights, nbytes), op = _linear(env, STREAMED)
    row = env.normal(1, STREAMED)
    return {
        "copy": 2 * RING_BYTES / time([lambda: y.copy_(x)]),
        "sum": RING_BYTES / time([x.sum]),
        "gemm.linear, one row": nbytes / time([partial(op, row, w) for w in weights]),
    }


def matmul_rate(env: PerfEnv, synchronize: Callable[[], None]) -> dict[str, float]:
    """Operations a second of square products: PyTorch's and the linear kernel's."""
    time = partial(seconds_a_call, synchronize=synchronize, budget=PROBE_SECONDS, of=min)
    side = SMALLEST
    while True:
        a, b = (torch.ones(side, side, dtype=env.dtype, device=env.device) for _ in range(2))
        seconds = time([lambda a=a, b=b: torch.matmul(a, b)])  # type: ignore[misc]
        if seconds > LONG_ENOUGH or side >= LARGEST:
            break
        side *= 2
    (weights, _), op = _linear(env, side)
    return {
        "matmul": 2 * side**3 / seconds,
        "gemm.linear": 2 * side**3 / time([partial(op, a, weights[0])]),
    }


def _linear(env: PerfEnv, side: int) -> tuple[Weights, Op]:
    dims = {"in": side, "out": side}
    op = env.op("gemm.linear", fmt="dense", dims=dims)
    return env.weights(env.site("gemm.linear", fmt="dense", dims=dims), side, side), op
