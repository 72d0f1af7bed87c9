"""Grants page ids of one pool. Host integers only: the pool's tensors live elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_core.errors import SglangError

SCRATCH_PAGE = 0  # padding writes land there, so no req ever owns it


class OutOfPagesError(SglangError):
    """More pages were asked for than are free; the caller should have evicted or retracted first."""


class PageAllocator:
    """A stack of free page ids in `[1, num_pages)`; `num_pages` is the pool's N and counts the scratch page."""

    def __init__(self, num_pages: int, on_free: Callable[[Sequence[int]], None] | None = None) -> None:
        assert num_pages >= 2, f"num_pages={num_pages}: a pool needs the scratch page and one more"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._granted = bytearray(num_pages)
        self._on_free = on_free  # told of every page that is given back, before it can be granted again

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that can be granted in all."""
        return self.num_pages - 1

    def alloc(self, n: int) -> list[int]:
        """Grant `n` pages. Raises OutOfPagesError, granting none, if fewer are free."""
        if n > len(self._free):
            raise OutOfPagesError(f"{n} pages wanted, {len(self._free)} of {self.num_usable} free")
        if n == 0:
            return []
        pages = self._free[-n:]
        del self._free[-n:]
        for page in pages:
            self._granted[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Take back pages that were granted."""
        for page in pages:
            assert self._granted[page], f"page {page} is freed but was not granted"
            self._granted[page] = 0
        self._free.extend(pages)
        if self._on_free is not None and pages:
            self._on_free(pages)
