"""lora.apply against its op body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.lora import apply
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

pytestmark = pytest.mark.usefixtures("tiles")
ADAPTERS = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [(), (33, 7)], ids=["one part", "two parts"])
@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_each_token_gets_its_own_adapter(num_tokens: int, parts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sizes that are no multiples of a tile, more inputs than one part of the sum has, rows that lie apart; and tokens of none."""
    torch.manual_seed(0)
    count, rank, depth = len(parts) or 1, 5, 600
    x, y = torch.randn(num_tokens, depth + 8).to(dtype)[:, 8:], torch.randn(num_tokens, 40).to(dtype)
    a = (depth**-0.5 * torch.randn(ADAPTERS, count * rank, depth)).to(dtype)
    b = torch.randn(ADAPTERS, 40, rank).to(dtype)
    own = (torch.arange(num_tokens, dtype=torch.int32) * 7) % (ADAPTERS + 1) - 1
    scale = torch.linspace(0.5, 2.0, ADAPTERS * count).view(ADAPTERS, count)
    args = y, x, a, b, own, scale, parts
    got = apply(*args)
    assert_close(got, OPS["lora.apply"].body(*args), scale=4)
    assert torch.equal(got[own < 0], y[own < 0])


def test_a_token_does_not_feel_its_neighbours() -> None:
    """Not even theirs that are NaN."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 64), torch.randn(20, 48)
    a, b, scale = torch.randn(ADAPTERS, 4, 64), torch.randn(ADAPTERS, 48, 4), torch.ones(ADAPTERS, 1)
    own = torch.arange(20, dtype=torch.int32) % ADAPTERS
    alone = apply(y[:1], x[:1], a, b, own[:1], scale)
    x[1:] = float("nan")
    assert torch.equal(apply(y, x, a, b, own, scale)[:1], alone)


def test_no_tokens() -> None:
    none = torch.empty(0, dtype=torch.int32)
    a, b, scale = torch.randn(ADAPTERS, 4, 64), torch.randn(ADAPTERS, 48, 4), torch.ones(ADAPTERS, 1)
    assert apply(torch.empty(0, 48), torch.empty(0, 64), a, b, none, scale).shape == (0, 48)
