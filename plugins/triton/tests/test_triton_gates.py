"""ssm.gates against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.gates import gates
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

pytestmark = pytest.mark.usefixtures("tiles")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "group"), [(0, 2, 2), (1, 16, 2), (37, 3, 5), (9, 4, 1)])
def test_of_a_projection_by_key_head(tokens: int, heads: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    b, a = (4 * torch.randn(tokens, heads, 2, group)).to(dtype).unbind(2)
    rate, dt_bias = -torch.rand(heads * group), torch.randn(heads * group)
    for got, want in zip(gates(b, a, rate, dt_bias), OPS["ssm.gates"].body(b, a, rate, dt_bias), strict=True):
        assert_close(got, want)


def test_no_digit_of_a_slow_decay_is_lost() -> None:
    """Of exp(-17), 4e-8, nothing is left in float32 once it was added to 1."""
    a = torch.linspace(-80.0, 40.0, 1000).view(-1, 1, 1)
    rate, dt_bias = torch.tensor([-1.0]), torch.zeros(1)
    got, _ = gates(a, a, rate, dt_bias)
    want, _ = OPS["ssm.gates"].body(a.double(), a.double(), rate, dt_bias)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)


def test_gates_that_say_all_or_nothing() -> None:
    b = torch.tensor([-torch.inf, -200.0, 200.0, torch.inf]).view(-1, 1, 1)
    g, beta = gates(b, b, torch.tensor([-2.0]), torch.zeros(1))
    assert beta.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert g.flatten().tolist() == [0.0, 0.0, -400.0, -torch.inf]
