"""`KernelStream`: in order, who waits is woken late but always, and errors reach them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from sglang_xeon.stream import KernelStream

LONG = 20.0  # seconds: never reached where all is well


@pytest.fixture
def stream() -> Iterator[KernelStream]:
    made = KernelStream(lambda: None)
    yield made
    made.close()


class Gate:
    """Work that says when it has begun, and ends when it may."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.begun, self.may_end, self._before = threading.Event(), threading.Event(), before

    def __call__(self) -> str:
        self._before()
        self.begun.set()
        assert self.may_end.wait(LONG)
        return "done"


def test_what_is_submitted_runs_in_order(stream: KernelStream) -> None:
    seen: list[int] = []
    works = [stream.submit(seen.append, i) for i in range(50)]
    assert [work.result(LONG) for work in works] == [None] * 50
    assert seen == list(range(50))


def test_a_result_is_kept_back_until_the_next_step_reaches_its_kernels(stream: KernelStream) -> None:
    first, second = Gate(), Gate()
    third = Gate(stream.wake)
    works = [stream.submit(step) for step in (first, second, third)]
    first.may_end.set()
    assert second.begun.wait(LONG)
    assert not works[0].done()
    second.may_end.set()
    assert third.begun.wait(LONG)
    assert works[0].done() and works[1].done() and not works[2].done()
    third.may_end.set()
    assert works[2].result(LONG) == "done"


def test_the_last_result_is_not_kept_back(stream: KernelStream) -> None:
    assert stream.submit(lambda: 7).result(LONG) == 7


def test_errors_are_results(stream: KernelStream) -> None:
    def fail() -> None:
        raise ValueError("no such page")

    failed, works = stream.submit(fail), stream.submit(lambda: 1)
    with pytest.raises(ValueError, match="no such page"):
        failed.result(LONG)
    assert works.result(LONG) == 1


def test_closing_cancels_what_has_not_begun() -> None:
    stream, running = KernelStream(lambda: None), Gate()
    first = stream.submit(running)
    assert running.begun.wait(LONG)
    second = stream.submit(lambda: 1)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._pool._shutdown:
        pass
    running.may_end.set()
    closing.join(LONG)
    assert first.result(LONG) == "done" and second.cancelled()
