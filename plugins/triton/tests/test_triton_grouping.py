"""Rows in the order of their groups, against PyTorch's stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_triton.grouping import BLOCK, MOST_GROUPS, by_group
from torch import Tensor


def expected(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    none = (group < 0) | (group >= num_groups)
    group = group.masked_fill(none, num_groups).long()
    return torch.sort(group, stable=True).indices.int(), torch.bincount(group, minlength=num_groups + 1)[
        :num_groups
    ].int()


def check(group: Tensor, num_groups: int, lookup: Tensor | None = None) -> None:
    order, sizes = by_group(group, num_groups, lookup)
    want = expected(group if lookup is None else lookup[group.long()], num_groups)
    assert torch.equal(order, want[0]) and torch.equal(sizes, want[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 700), st.integers(1, 40), st.integers(0, 2**20))
def test_any_rows(num_rows: int, num_groups: int, seed: int) -> None:
    """Of none too, in one block and in several."""
    rng = torch.Generator().manual_seed(seed)
    check(torch.randint(-1, num_groups + 2, (num_rows,), generator=rng, dtype=torch.int32), num_groups)


@pytest.mark.parametrize("num_rows", [1, 16, 17, BLOCK, BLOCK + 1, 40 * BLOCK + 3])
@pytest.mark.parametrize("num_groups", [1, 128, 256, MOST_GROUPS, MOST_GROUPS + 1])
def test_sizes_at_the_edges(num_rows: int, num_groups: int) -> None:
    """More blocks than are added up at once; more groups than a program counts."""
    torch.manual_seed(0)
    check(torch.randint(0, num_groups, (num_rows,), dtype=torch.int32), num_groups)


@pytest.mark.parametrize("num_rows", [9, 1000])
def test_experts_that_other_ranks_hold(num_rows: int) -> None:
    torch.manual_seed(0)
    lookup = torch.full((64,), -1, dtype=torch.int32)
    lookup[16:32] = torch.randperm(16, dtype=torch.int32)
    check(torch.randint(0, 64, (num_rows,), dtype=torch.int32), 16, lookup)
    check(torch.full((num_rows,), 3, dtype=torch.int32), 16, lookup)  # nothing is here
    check(torch.full((num_rows,), 20, dtype=torch.int32), 16, lookup)  # all is one expert's
