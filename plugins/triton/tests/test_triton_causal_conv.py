"""ssm.causal_conv1d against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.causal_conv import causal_conv1d
from triton_states import DECODE, LAYER, Reqs, make_spec, make_step
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

pytestmark = pytest.mark.usefixtures("tiles")
MIXED: Reqs = [(True, 1), (False, 20), (True, 9), (True, 2), (False, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reqs", "in_place", "padding", "taps"),
    [(DECODE, False, 0, 4), (DECODE, True, 3, 4), (MIXED, True, 2, 4), (MIXED, False, 0, 2), (DECODE, True, 0, 7)],
    ids=["decode", "decode in place", "mixed in place", "two taps", "seven taps"],
)
def test_each_req_goes_on_from_its_own_inputs(
    reqs: Reqs, in_place: bool, padding: int, taps: int, dtype: torch.dtype
) -> None:
    """Odd numbers of channels, rows that lie apart, a bias; what tokens of no req hold is NaN, and they give zeros."""
    torch.manual_seed(0)
    spec = make_spec(1, 3, 24, 20, taps=taps)
    pool, plan, tokens = make_step(spec, reqs, dtype, in_place=in_place, padding=padding)
    mine, _, _ = make_step(spec, reqs, dtype, in_place=in_place, padding=padding)
    x = torch.randn(tokens, spec.conv_dim + 3).to(dtype)[:, 3:]
    x[tokens - padding :] = float("nan")
    weight, bias = torch.randn(spec.conv_dim, taps).to(dtype), torch.randn(spec.conv_dim).to(dtype)
    for activation, more in ((None, bias), ("silu", None)):
        want = OPS["ssm.causal_conv1d"].body(x, weight, more, pool, LAYER, plan, activation=activation)
        assert_close(causal_conv1d(x, weight, more, mine, LAYER, plan, activation=activation), want, scale=4)
        torch.testing.assert_close(mine.conv(LAYER)[1:], pool.conv(LAYER)[1:], rtol=0, atol=0, equal_nan=True)
