from __future__ import annotations

import pytest
import torch
from sglang_xeon import logits as ops
from sglang_xeon import norm
from tolerance import assert_close

from sglang_core.api.ops import OPS

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(1, 151936), (5, 517), (0, 64), (3, 31), (2, 33)])
def test_mask_is_the_body(level: str, dtype: torch.dtype, rows: int, vocab: int) -> None:
    x = torch.randn(rows, vocab).to(dtype)
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab // 32))).int()
    if rows > 1:
        bits[1] = -1
    got = ops.mask(x, bits)
    assert got.dtype == dtype
    assert torch.equal(got, OPS["logits.mask"].body(x, bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adjust_is_the_body(level: str, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 333) * 4).to(dtype)
    x[2, 5] = float("-inf")
    at = torch.randperm(4 * 333)[:60]
    rows, ids = (at // 333).int(), (at % 333).int()
    repetition, add = torch.linspace(0.5, 2, 60), torch.randn(60)
    repetition[50:], add[50:] = 1.0, 0.0
    rows[50:], ids[50:] = rows[1], ids[1]  # padding names an entry in use
    rows[0], ids[0], rows[2], ids[2], add[2] = 2, 5, 1, 7, float("-inf")
    kept = x.clone()
    got = ops.adjust(x, rows, ids, repetition, add)
    torch.testing.assert_close(got, OPS["logits.adjust"].body(x, rows, ids, repetition, add))
    assert torch.equal(x, kept)
    assert got[1, 7] == float("-inf")


def test_adjust_names_what_is_not_there(level: str) -> None:
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"no logit at \[0, 9\]"):
        ops.adjust(torch.randn(2, 9), torch.tensor([0]).int(), torch.tensor([9]).int(), one, one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap_is_the_body(level: str, dtype: torch.dtype) -> None:
    x = (torch.randn(6, 501) * 40).to(dtype)
    got = ops.soft_cap(x, 30.0)
    torch.testing.assert_close(got, OPS["logits.soft_cap"].body(x, 30.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (0, 64), (2, 3, 20), (300, 100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_is_the_body(level: str, dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    x, w = (torch.randn(shape) * 3 + 2).to(dtype), torch.randn(shape[-1]).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
    assert_close(norm.layer_norm(x, w, bias, 1e-5), OPS["norm.layer"].body(x, w, bias, 1e-5), scale=4)
