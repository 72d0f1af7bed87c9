"""Pages are granted once, come back, and scratch is nobody's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.cache.page_allocator import SCRATCH_PAGE, OutOfPagesError, PageAllocator


@given(st.lists(st.integers(0, 4)))
def test_pages_are_granted_once_and_come_back(sizes: list[int]) -> None:
    alloc = PageAllocator(num_pages=9)
    grants = [alloc.alloc(n) for n in sizes if n <= alloc.num_free]
    pages = [page for grant in grants for page in grant]
    assert len(pages) == len(set(pages)) == 8 - alloc.num_free
    assert all(SCRATCH_PAGE < page < 9 for page in pages)
    for grant in grants:
        alloc.free(grant)
    assert alloc.num_free == alloc.num_usable == 8


def test_a_grant_too_large_is_refused_whole() -> None:
    alloc = PageAllocator(num_pages=4)
    alloc.alloc(2)
    with pytest.raises(OutOfPagesError, match="2 pages wanted, 1 of 3 free"):
        alloc.alloc(2)
    assert alloc.num_free == 1


@pytest.mark.parametrize("pages", [[SCRATCH_PAGE], [3], [1, 1]])
def test_freeing_what_was_not_granted_is_a_bug(pages: list[int]) -> None:
    alloc = PageAllocator(num_pages=4)
    assert alloc.alloc(1) == [1]
    with pytest.raises(AssertionError, match="was not granted"):
        alloc.free(pages)
