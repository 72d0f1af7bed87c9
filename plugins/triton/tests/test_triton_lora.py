"""lora.apply, lora.embed and lora.experts against their op bodies, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.lora import apply, embed
from sglang_triton.lora_experts import experts
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, ExpertAdapters, ExpertSpec

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_the_row_of_its_own_table(dtype: torch.dtype) -> None:
    """Ids before, in and past the table; tokens of no adapter."""
    torch.manual_seed(0)
    y, ids = torch.randn(40, 48).to(dtype), torch.arange(40, dtype=torch.int32) * 3
    a, b = torch.randn(ADAPTERS, 50, 5).to(dtype), torch.randn(ADAPTERS, 48, 5).to(dtype)
    own = (torch.arange(40, dtype=torch.int32) * 7) % (ADAPTERS + 1) - 1
    args = y, ids, a, b, own, torch.linspace(0.5, 2.0, ADAPTERS)[:, None], 20
    got = embed(*args)
    assert_close(got, OPS["lora.embed"].body(*args), scale=4)
    assert torch.equal(got[own < 0], y[own < 0])


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_its_adapter_of_its_expert(dtype: torch.dtype, weight_on_input: bool) -> None:
    """Some experts are another rank's, some tokens have no adapter."""
    torch.manual_seed(0)
    tokens, hidden, width, rank, num = 9, 24, 20, 3, 4

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape)).to(dtype)

    quantize = OPS["quant.quantize"].body
    w13, w2 = (quantize(normal(num, *shape, scale=0.2), "dense") for shape in ((2 * width, hidden), (hidden, width)))
    adapters = ExpertAdapters(
        a13=normal(ADAPTERS, num, 2 * rank, hidden, scale=0.2),
        b13=normal(ADAPTERS, num, 2 * width, rank),
        a2=normal(ADAPTERS, num, rank, width, scale=0.2),
        b2=normal(ADAPTERS, num, hidden, rank),
        scale=torch.linspace(0.5, 2.0, ADAPTERS * num * 3).view(ADAPTERS, num, 3),
    )
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]).int()
    expert_map = torch.tensor([0, 1, -1, 2, 3, -1], dtype=torch.int32)
    own = torch.arange(tokens, dtype=torch.int32) % (ADAPTERS + 1) - 1
    act = ExpertSpec(activation="silu", weight_on_input=weight_on_input)
    args = normal(tokens, hidden), w13, w2, torch.rand(tokens, 2), ids, act, adapters
    for given in (own, None):
        want = OPS["lora.experts"].body(*args, given, expert_map=expert_map)
        assert_close(experts(*args, given, expert_map=expert_map), want, scale=16)
    none = (args[0][:0], w13, w2, args[3][:0], ids[:0], act, adapters, own[:0])
    assert experts(*none, expert_map=expert_map).shape == (0, hidden)
