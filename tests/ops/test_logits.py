from __future__ import annotations

import math

import pytest
import torch

from sglang_core.ops.logits import adjust, mask, soft_cap


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_mask(vocab: int) -> None:
    allowed = torch.rand(4, vocab) < 0.5
    allowed[1], allowed[2] = True, False
    words = torch.zeros(4, -(-vocab // 32), dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        words[row, token // 32] |= 1 << (token % 32)
    words[1] = -1
    logits = torch.randn(4, vocab)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(mask(logits, words), torch.where(allowed, logits, -math.inf))


def test_soft_cap() -> None:
    logits = torch.tensor([[-1000.0, -3.0, 0.0, 3.0, 1000.0]])
    torch.testing.assert_close(soft_cap(logits, 30.0), 30 * torch.tanh(logits / 30))
    assert soft_cap(logits.bfloat16(), 30.0).dtype == torch.float32


def entries(*rows: tuple[int, int, float, float]) -> tuple[torch.Tensor, ...]:
    row, token, repetition, add = zip(*rows, strict=True) if rows else ((), (), (), ())
    ints, floats = torch.int32, torch.float32
    return (
        torch.tensor(row, dtype=ints),
        torch.tensor(token, dtype=ints),
        torch.tensor(repetition, dtype=floats),
        torch.tensor(add, dtype=floats),
    )


def test_adjust() -> None:
    logits = torch.tensor([[4.0, -4.0, 1.0], [0.0, 2.0, -math.inf]])
    before = logits.clone()
    got = adjust(
        logits, *entries((0, 0, 2.0, 0.5), (0, 1, 2.0, 0.0), (1, 1, 1.0, -math.inf), (1, 2, 1.5, 3.0), (1, 0, 9.0, 1.0))
    )
    assert torch.equal(got, torch.tensor([[2.5, -8.0, 1.0], [1.0, -math.inf, -math.inf]]))
    assert torch.equal(logits, before)


def test_padding_may_name_an_entry_in_use() -> None:
    logits = torch.randn(2, 3)
    want = adjust(logits, *entries((0, 0, 2.0, 0.5)))
    assert torch.equal(adjust(logits, *entries((0, 0, 2.0, 0.5), (0, 0, 1.0, 0.0), (0, 0, 1.0, 0.0))), want)
    forbidden = adjust(logits, *entries((0, 0, 1.0, -math.inf), (0, 0, 1.0, 0.0)))
    assert forbidden[0, 0] == -math.inf
    assert torch.equal(adjust(logits, *entries()), logits)


def test_a_large_finite_bias_forbids_too() -> None:
    got = adjust(torch.randn(1, 2), *entries((0, 1, 1.0, -1e30)))
    assert got.isfinite().all()
    assert got[0, 1] < -1e29
