from __future__ import annotations

import pytest
import torch
from sglang_xeon import lora
from tolerance import assert_close

from sglang_core.api.ops import OPS

DTYPES = [torch.bfloat16, torch.float32]
BODY = OPS["lora.apply"].body


def stacks(
    adapters: int, rank: int, width: int, parts: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    a = (torch.randn(adapters, len(parts) * rank, width) * width**-0.5).to(dtype)
    b = (torch.randn(adapters, sum(parts), rank) * rank**-0.5).to(dtype)
    return a, b, torch.rand(adapters, len(parts)) + 0.5


# Ranks that fill a transposed block of 16, several, and none; a part that fills no panel; more tokens than a task takes.
SHAPES = [
    (1, 16, 64, (96,)),
    (9, 16, 128, (64, 32, 32)),
    (5, 8, 67, (33, 7)),
    (7, 40, 50, (300,)),
    (150, 32, 34, (48, 16)),
    (3, 5, 7, (1,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, rank, width, parts", SHAPES)
def test_apply_is_the_body(
    level: str, dtype: torch.dtype, tokens: int, rank: int, width: int, parts: tuple[int, ...]
) -> None:
    a, b, scale = stacks(4, rank, width, parts, dtype)
    own = torch.randint(-1, 4, (tokens,), dtype=torch.int32)
    own[0] = 2
    y, x = torch.randn(tokens, sum(parts)).to(dtype), torch.randn(tokens, width).to(dtype)
    kept = y.clone()
    got = lora.apply(y, x, a, b, own, scale, parts if len(parts) > 1 else ())
    want = BODY(y.double(), x.double(), a.double(), b.double(), own, scale, parts if len(parts) > 1 else ()).to(dtype)
    assert_close(got, want, scale=2)
    assert torch.equal(got[own < 0], kept[own < 0])
    assert torch.equal(y, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_result_is_its_own(level: str, dtype: torch.dtype) -> None:
    """To the bit, whoever shares its adapter, and whatever the number of threads."""
    a, b, scale = stacks(3, 16, 72, (80,), dtype)
    own = torch.randint(-1, 3, (170,), dtype=torch.int32)
    y, x = torch.randn(170, 80).to(dtype), torch.randn(170, 72).to(dtype)
    whole = lora.apply(y, x, a, b, own, scale)
    for at in (slice(0, 1), slice(4, 7), slice(20, 33), slice(50, 170)):
        assert torch.equal(lora.apply(y[at], x[at], a, b, own[at], scale), whole[at])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(lora.apply(y, x, a, b, own, scale), whole)
    finally:
        torch.set_num_threads(before)


def test_no_tokens_and_views(level: str) -> None:
    a, b, scale = stacks(2, 4, 16, (24,), torch.bfloat16)
    empty = lora.apply(torch.zeros(0, 24).bfloat16(), torch.zeros(0, 16).bfloat16(), a, b, torch.zeros(0).int(), scale)
    assert empty.shape == (0, 24)
    y, x = torch.randn(6, 40).bfloat16()[:, 8:32], torch.randn(6, 32).bfloat16()[:, ::2]
    own = torch.tensor([0, 1, -1, 1, 0, 0], dtype=torch.int32)
    got = lora.apply(y, x, a, b, own, scale)
    assert torch.equal(got, lora.apply(y.contiguous(), x.contiguous(), a, b, own, scale))


def test_a_float32_head_has_bfloat16_adapters(level: str) -> None:
    a, b, scale = stacks(2, 4, 16, (24,), torch.bfloat16)
    y, x, own = torch.randn(3, 24), torch.randn(3, 16), torch.tensor([0, -1, 1], dtype=torch.int32)
    assert torch.equal(lora.apply(y, x, a, b, own, scale), BODY(y, x, a, b, own, scale))
    got = lora.apply(y, x.bfloat16(), a, b, own, scale)
    assert_close(got, BODY(y, x.bfloat16(), a, b, own, scale), scale=2)


def test_wrong_sizes_are_refused(level: str) -> None:
    a, b, scale = stacks(2, 4, 16, (24,), torch.float32)
    own = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="stacks' shapes do not fit"):
        lora.apply(torch.zeros(3, 24), torch.zeros(3, 15), a, b, own, scale)
    with pytest.raises(RuntimeError, match="an adapter a token"):
        lora.apply(torch.zeros(3, 24), torch.zeros(3, 16), a, b, own[:2], scale)
