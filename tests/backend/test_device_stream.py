"""Steps are launched by a thread of their own, in an order that holds on a device."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from sglang_core.api import DeviceStream
from tests.backend.fake_driver import FakeDriver, FakeDriverError, FakeStream


def test_inputs_of_the_submitting_thread_come_first() -> None:
    driver = FakeDriver(watch=True)
    stream = DeviceStream(driver)
    with driver.watching():
        x = torch.ones(4)
        y = stream.submit(lambda x: x + 1, x).result()
        assert (y * 2).tolist() == [4] * 4  # `result` waited for the step, so this thread may read it
    stream.close()
    assert driver.num_bound == 1


def test_the_fake_sees_a_stream_that_does_not_wait() -> None:
    driver = FakeDriver(watch=True)
    with driver.watching():
        x = torch.ones(4)
    other = FakeStream()
    with pytest.raises(FakeDriverError, match="no event"), driver.on(other):
        x.add(1)
    with driver.on(other):
        driver.wait(other, driver.record(driver.default))
        x.add(1)


def test_arguments_live_until_the_step_is_over() -> None:
    stream, go = DeviceStream(FakeDriver()), threading.Event()
    x = torch.ones(4)
    seen = weakref.ref(x)
    work = stream.submit(lambda x: x.sum(), x)
    behind = stream.submit(go.wait)
    del x
    assert seen() is not None and not behind.done()
    go.set()
    assert work.result().item() == 4 and work.done()
    behind.result()
    assert seen() is None
    stream.close()


def test_an_error_of_a_step_is_raised_by_its_work_alone() -> None:
    stream = DeviceStream(FakeDriver())
    bad = stream.submit(lambda: 1 // 0)
    good = stream.submit(lambda: 5)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert good.result() == 5 and bad.done()
    stream.close()
