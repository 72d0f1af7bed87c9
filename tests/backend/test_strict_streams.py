"""Streams of the strict backend: what another stream or the host touches must be known to be over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.backend.devices import open_device
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.strict_trace import StrictError

SPEC = PoolSpec(num_layers=1, page_size=4, num_kv_heads=1, head_dim=8, v_head_dim=8, dtype=torch.float32)
PAGES = torch.tensor([1, 2], dtype=torch.int32)


@dataclass(kw_only=True, slots=True)
class Batch:
    x: Tensor
    slot_mapping: Tensor


@dataclass(kw_only=True, slots=True)
class State:
    pool: Pool

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield from self.pool.leaves


def batch() -> Batch:
    return Batch(x=torch.arange(16.0).view(2, 8), slot_mapping=torch.tensor([4, 5], dtype=torch.int32))


def write(state: State, fb: Batch) -> Tensor:
    state.pool.scatter(0, fb.slot_mapping, fb.x[:, None], fb.x[:, None])
    return fb.x * 2.0


@pytest.fixture
def runtime() -> Iterator[Any]:
    chosen = open_device("strict")
    runtime = chosen.backend.create_runtime(RuntimeContext(devices=(chosen.info,)))
    yield runtime
    runtime.close()


@pytest.fixture
def streams(runtime: Any) -> Iterator[tuple[Any, Any]]:
    found = runtime.stream(), runtime.stream()
    yield found
    for stream in found:
        stream.close()


@pytest.fixture
def step(runtime: Any) -> tuple[Any, State]:
    state = State(pool=runtime.alloc_pool(SPEC, 4))
    return runtime.compile_step(write, state, ()), state


def test_one_stream_is_in_order(streams: tuple[Any, Any], step: tuple[Any, State]) -> None:
    call, state = step
    streams[0].submit(call, batch())
    work = streams[0].submit(state.pool.export_pages, 0, PAGES)
    assert torch.equal(work.result()[0][0, :2, 0], batch().x[:2])


def refused(*works: Any) -> str:
    """What one of them is refused with: whichever came second, which is for the host's scheduler to say."""
    with pytest.raises(StrictError, match=r"wait for its Work \(the event\) with result\(\)") as e:
        [work.result() for work in works]
    return str(e.value)


def test_pages_copied_on_another_stream_without_an_event(streams: tuple[Any, Any], step: tuple[Any, State]) -> None:
    """As when pages go to another tier while the step that writes them runs."""
    call, state = step
    streams[0].submit(call, batch()).result()
    assert streams[1].submit(state.pool.export_pages, 0, PAGES).result()[0].shape[0] == 2
    works = [streams[0].submit(call, batch()), streams[1].submit(state.pool.export_pages, 0, PAGES)]
    assert "uses on another stream, and nothing says that it is over" in refused(*works)


def test_an_event_may_be_waited_for_on_the_stream(streams: tuple[Any, Any], step: tuple[Any, State]) -> None:
    call, state = step
    done = streams[0].submit(call, batch())

    def copy() -> Any:
        done.result()
        return state.pool.export_pages(0, PAGES)

    assert len(streams[1].submit(copy).result()) == 2


def test_the_host_copies_pages_while_the_step_runs(streams: tuple[Any, Any], step: tuple[Any, State]) -> None:
    call, state = step
    done = streams[0].submit(call, batch())
    streams[0].submit(lambda: None).result()  # it is over; but nobody who only saw this task end later may rely on it
    state.pool.export_pages(0, PAGES)
    done.result()
    again = streams[0].submit(call, batch())
    while not again.done():
        pass
    with pytest.raises(StrictError, match="the host reads a torch.float32 tensor"):
        state.pool.export_pages(0, PAGES)
    again.result()
    state.pool.export_pages(0, PAGES)


def test_a_step_on_another_stream_than_the_one_before(streams: tuple[Any, Any], step: tuple[Any, State]) -> None:
    call, _ = step
    assert "writes a torch.float32 tensor" in refused(*(stream.submit(call, batch()) for stream in streams))


def test_a_step_is_known_to_use_its_state_while_it_is_traced(
    runtime: Any, streams: tuple[Any, Any], step: tuple[Any, State]
) -> None:
    """Tracing is the longest part of a first call. The other step is refused then, and the traced one goes on."""
    call, state = step
    traced, go_on = threading.Event(), threading.Event()

    def waits(state: State, fb: Batch) -> Tensor:
        traced.set()
        assert go_on.wait(30)
        return write(state, fb)

    held = streams[1].submit(runtime.compile_step(waits, state, ()), batch())
    assert traced.wait(30)
    try:
        assert "writes a torch.float32 tensor" in refused(streams[0].submit(call, batch()))
    finally:
        go_on.set()
    assert torch.equal(held.result(), batch().x * 2.0)


def test_tensors_that_two_streams_share(streams: tuple[Any, Any]) -> None:
    x = torch.zeros(4)
    streams[0].submit(x.add_, 1.0).result()
    reading = streams[1].submit(lambda: x * 2)
    assert reading.result().tolist() == [2.0] * 4
    streams[0].submit(x.add_, 1.0).result()
    assert "float32 tensor [4]" in refused(streams[0].submit(x.add_, 1.0), streams[1].submit(lambda: x * 2))


def test_memory_that_is_given_out_again_is_no_race(streams: tuple[Any, Any]) -> None:
    for i in range(50):
        made = streams[i % 2].submit(lambda: torch.ones(8).mul_(2.0).sum())
        assert made.done() in (True, False)
    made.result()


def test_an_error_reaches_who_waits_and_the_stream_goes_on(streams: tuple[Any, Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        streams[0].submit(lambda: 1 // 0).result()
    assert streams[0].submit(lambda: 7).result() == 7
