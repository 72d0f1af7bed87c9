"""logits.* against their op bodies, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.logits import adjust, mask, soft_cap
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS

pytestmark = pytest.mark.usefixtures("tiles")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 40), (1, 1), (5, 77), (3, 2500)])
def test_mask(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Infinite logits stay what they are, and a slice's neighbours are not looked at."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab + 3).to(dtype)[:, 3:]
    logits[:, :1] = float("inf")
    words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab // 32)), dtype=torch.int32)
    assert torch.equal(mask(logits, words), OPS["logits.mask"].body(logits, words))


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(dtype: torch.dtype) -> None:
    logits = torch.linspace(-400.0, 400.0, 2200).view(2, 1100).to(dtype)
    assert_close(soft_cap(logits, 30.0), OPS["logits.soft_cap"].body(logits, 30.0))
    assert soft_cap(logits[:0], 30.0).shape == (0, 1100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adjust(dtype: torch.dtype) -> None:
    """One entry forbids, one finds a token forbidden already; padding names them both, and changes neither."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(4, 90)).to(dtype)
    logits[2, 5] = float("-inf")
    rows, ids = (
        torch.tensor([0, 0, 1, 2, 0, 2], dtype=torch.int32),
        torch.tensor([3, 4, 89, 5, 3, 5], dtype=torch.int32),
    )
    repetition, add = (
        torch.tensor([1.0, 1.5, 0.5, 2.0, 1.0, 1.0]),
        torch.tensor([float("-inf"), 0.3, -1.0, 0.5, 0.0, 0.0]),
    )
    args = logits, rows, ids, repetition, add
    assert_close(adjust(*args), OPS["logits.adjust"].body(*args))
    nothing = rows[:0], ids[:0], repetition[:0], add[:0]
    assert torch.equal(adjust(logits, *nothing), logits.float())
