from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from sglang_core.server.fan_in import fan_in


class Source:
    """Yields `count` numbers, then fails if told to; remembers that it was closed."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.count, self.fails, self.is_closed = count, fails, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for i in range(self.count):
                await asyncio.sleep(0)
                yield i
            if self.fails:
                raise ValueError("broken")
        finally:
            self.is_closed = True


@pytest.mark.parametrize("counts", [[3], [3, 0, 2], [1] * 20])
async def test_everything_comes_in_order_within_its_source(counts: list[int]) -> None:
    sources = [Source(count) for count in counts]
    got: list[list[int]] = [[] for _ in counts]
    async for which, item in fan_in([source.items() for source in sources]):
        got[which].append(item)
    assert got == [list(range(count)) for count in counts]
    assert all(source.is_closed for source in sources)


async def test_an_error_ends_all() -> None:
    sources = [Source(1000), Source(2, fails=True)]
    with pytest.raises(ValueError, match="broken"):
        async for _ in fan_in([source.items() for source in sources]):
            pass
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("number", [1, 3])
async def test_closing_closes_the_sources(number: int) -> None:
    sources = [Source(1000) for _ in range(number)]
    merged = fan_in([source.items() for source in sources])
    await anext(merged)
    await merged.aclose()
    assert any(source.is_closed for source in sources)
    assert all(source.is_closed for source in sources) or number > 1
