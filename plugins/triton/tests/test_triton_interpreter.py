"""What is changed of Triton's interpreter."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import torch
import triton
import triton.language as tl

ROWS = """
import torch, triton, triton.language as tl
from sglang_triton.interpreter import quicken

@triton.jit
def product(x, w, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(x + m[:, None] * K + k[None, :]), tl.load(w + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))

quicken()
torch.manual_seed(0)
x, w = torch.randn(16, 64), torch.randn(64, 32)
def run(x):
    out = torch.empty(16, 32)
    product[(1,)](x, w, out, 16, 64, 32)
    return out
whole = run(x)
assert torch.allclose(whole, (x.double() @ w.double()).float(), rtol=1e-6, atol=1e-6)
for shift in range(1, 16):
    assert torch.equal(run(x.roll(shift, 0)), whole.roll(shift, 0)), shift
"""


@triton.jit
def _multiply_add(x, y, z, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_a_multiply_add_rounds_once() -> None:
    """As the C library's does: what cancels, what is added far below the last bit of a tie, subnormals, infinities."""
    draw = np.random.default_rng(0)
    x, y, z = draw.integers(0, 2**32, (3, 8192), dtype=np.uint32).view(np.float32)
    z[:2048] = -x[:2048] * y[:2048]
    x[2048:4096], y[2048:4096] = (
        1 + draw.integers(0, 2**12, 2048) * 2.0**-12,
        1 + draw.integers(0, 2**12, 2048) * 2.0**-12,
    )
    z[2048:4096] = draw.choice(np.array([-1, 1]), 2048) * 2.0 ** draw.integers(-80, -20, 2048)
    x[4096:6144] = 2.0 ** draw.integers(-80, -60, 2048) * draw.uniform(1, 2, 2048)
    y[4096:6144] = 2.0 ** draw.integers(-80, -60, 2048) * draw.uniform(1, 2, 2048)
    z[4096:6144] = draw.integers(0, 9, 2048) * 2.0**-149
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    want = torch.tensor([fmaf(*row) for row in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)])
    out = torch.empty(8192)
    _multiply_add[(1,)](*map(torch.from_numpy, (x, y, z)), out, N=8192)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def test_a_rows_product_does_not_depend_on_its_place() -> None:
    """Kernels that promise the same bits in any company are held to it through these products."""
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", ROWS], check=True, env=environ, timeout=120)
