"""How far a kernel may be from the op's body, and why."""

from __future__ import annotations

import torch
from torch import Tensor

# Both sum in float32 in different orders: some units of 2^-24 of the sum of magnitudes. In bfloat16 the result is rounded once
# to 8 bits, and two float32 values that differ in the last bits may round apart: one unit of 2^-8, relative.
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ABSOLUTE = {torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def assert_close(got: Tensor, want: Tensor, *, scale: float = 1.0) -> None:
    """Same dtype and shape, and close; `scale` is the size of what was summed, where that exceeds the result."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=RELATIVE[got.dtype], atol=ABSOLUTE[got.dtype] * scale)
