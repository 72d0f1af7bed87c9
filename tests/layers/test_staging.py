"""Memory that goes back to the system when its tensor goes, whatever lives beside it."""

from __future__ import annotations

import os

import pytest
import torch

from sglang_core.layers.staging import LARGE, staging


def resident() -> int:
    """Bytes of this process that are in memory and its own."""
    with open("/proc/self/statm") as f:
        _, rss, shared = map(int, f.read().split()[:3])
    return (rss - shared) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_it_is_a_tensor_like_any_other(dtype: torch.dtype, rows: int) -> None:
    like = torch.empty(0, dtype=dtype)
    x = staging(like, (rows, 1000))
    assert (x.dtype, x.shape, x.device) == (dtype, (rows, 1000), like.device)
    x.copy_(torch.arange(rows)[:, None] % 100)
    view = x[-1]
    del x
    assert view.tolist() == [(rows - 1) % 100] * 1000, "a view keeps the memory"


def test_what_is_dropped_is_given_back() -> None:
    """Between tensors that stay, so that a heap could not shrink."""
    like, size = torch.empty(0, dtype=torch.uint8), 12 * LARGE
    staying, before = [], resident()
    for _ in range(8):
        staged = staging(like, (size,)).fill_(1)
        staying.append(torch.ones(LARGE // 16, dtype=torch.uint8))
        assert resident() - before > size // 2
        del staged
        assert resident() - before < size // 2 + 8 * LARGE // 16
