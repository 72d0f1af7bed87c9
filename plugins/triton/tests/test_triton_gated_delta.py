"""ssm.gated_delta_rule against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.gated_delta import gated_delta_rule
from torch import Tensor
from triton_states import DECODE, LAYER, MIXED, Reqs, make_spec, make_step
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, GatedDeltaSpec

pytestmark = pytest.mark.usefixtures("tiles")
ODD = make_spec(1, 3, 24, 20)


def inputs(spec: GatedDeltaSpec, tokens: int, dtype: torch.dtype, decay: float = 0.3) -> tuple[Tensor, ...]:
    """Heads that lie apart. `decay`: the mean of -g."""
    torch.manual_seed(0)
    size = spec.k_head_dim**-0.5
    q, k = (size * torch.randn(2, tokens, spec.num_k_heads, spec.k_head_dim + 3)).to(dtype)[..., 3:]
    v = torch.randn(tokens, spec.num_v_heads, spec.v_head_dim + 3).to(dtype)[..., 3:]
    g, beta = -2 * decay * torch.rand(tokens, spec.num_v_heads), torch.rand(tokens, spec.num_v_heads)
    return q, k, v, g, beta


def check(spec: GatedDeltaSpec, reqs: Reqs, given: tuple[Tensor, ...], *, in_place: bool, padding: int) -> None:
    dtype = given[2].dtype
    pool, plan, _ = make_step(spec, reqs, dtype, in_place=in_place, padding=padding)
    mine, _, _ = make_step(spec, reqs, dtype, in_place=in_place, padding=padding)
    want = OPS["ssm.gated_delta_rule"].body(*given, pool, LAYER, spec, plan)
    assert_close(gated_delta_rule(*given, mine, LAYER, spec, plan), want, scale=4)
    # float32 whatever the inputs are, after as many products as there are tokens.
    torch.testing.assert_close(mine.state(LAYER)[1:], pool.state(LAYER)[1:], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reqs", "in_place", "padding"),
    [(DECODE, False, 0), (DECODE, True, 3), (MIXED, True, 2)],
    ids=["decode", "decode in place", "mixed in place"],
)
def test_each_req_goes_on_from_its_own_state(reqs: Reqs, in_place: bool, padding: int, dtype: torch.dtype) -> None:
    """Chunks whole and in part, a few tokens, one, none; tokens of no req hold NaN, and give zeros."""
    given = inputs(ODD, sum(n for _, n in reqs) + padding, dtype)
    for x in given:
        x[x.shape[0] - padding :] = float("nan")
    check(ODD, reqs, given, in_place=in_place, padding=padding)


@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_decays_of_any_size(decay: float) -> None:
    """Running products of large ones underflow within a chunk."""
    spec, reqs = make_spec(1, 2, 16, 16), [(True, 130)]
    check(spec, reqs, inputs(spec, 130, torch.float32, decay), in_place=False, padding=0)


def test_keys_of_one_direction() -> None:
    """The system then has powers that grow like binomials: an inverse by a series of them has no digit left."""
    spec, reqs = make_spec(1, 2, 16, 16, l2norm=False), [(False, 64)]
    q, k, v, g, beta = inputs(spec, 64, torch.float32, 0.0)
    k = torch.nn.functional.normalize(k[:1], dim=-1).expand_as(k)
    check(spec, reqs, (q, k, v, g, torch.ones_like(beta)), in_place=False, padding=0)
