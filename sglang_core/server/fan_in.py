"""Several requests of one body run side by side; their chunks come back in the order in which they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None = None


_News = asyncio.Queue[tuple[int, T | _Ended]]


async def fan_in(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields (which source, item). The first error ends all; closing this closes every source."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    news: _News[T] = asyncio.Queue(maxsize=2 * len(sources))
    tasks = [asyncio.create_task(_pump(i, source, news)) for i, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            i, new = await news.get()
            if not isinstance(new, _Ended):
                yield i, new
            elif new.error is not None:
                raise new.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(i: int, source: AsyncGenerator[T, None], news: _News[T]) -> None:
    async with aclosing(source):
        try:
            async for item in source:
                await news.put((i, item))
        except Exception as exc:
            await news.put((i, _Ended(exc)))
        else:
            await news.put((i, _Ended()))
