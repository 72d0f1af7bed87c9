"""What is changed of Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_a_rows_product_does_not_depend_on_its_place() -> None:
    """Kernels that promise the same bits in any company are held to it through these products."""
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", ROWS], check=True, env=environ, timeout=120)
