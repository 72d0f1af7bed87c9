"""act.gated against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.activation import gated
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

body = OPS["act.gated"].body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(0, 64), (1, 2), (5, 74), (3, 2, 1030)])
def test_it_is_the_op(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    assert_close(gated(x, kind), body(x, kind))


def test_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 100)[:, 3:97]
    assert_close(gated(x, "silu"), body(x, "silu"))


def test_large_gates_stay_finite() -> None:
    x = torch.tensor([[-200.0, 200.0, -1e4, 88.8, 1.0, 1.0, 1.0, 1.0]])
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert_close(gated(x, kind), body(x, kind))
