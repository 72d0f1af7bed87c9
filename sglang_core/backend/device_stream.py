"""`DeviceStream`: a stream of the device, and a host thread that feeds it, so that who submits a step goes on at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sglang_core.backend.captured_driver import DeviceDriver, DeviceEvent
from sglang_core.backend.torch_runtime import HostStream


class DeviceStream:
    """In order with itself; and what the submitting thread has put on its own stream so far, inputs for one, comes first."""

    def __init__(self, driver: DeviceDriver) -> None:
        self._driver, self._stream = driver, driver.new_stream()
        self._host = HostStream(driver.bind)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> DeviceWork:
        ready = self._driver.record(self._driver.current_stream())
        return DeviceWork(self._host.submit(self._launch, ready, fn, args), args)

    def _launch(self, ready: DeviceEvent, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, DeviceEvent]:
        with self._driver.on(self._stream):
            self._driver.wait(self._stream, ready)
            return fn(*args), self._driver.record(self._stream)

    def close(self) -> None:
        self._host.close()


class DeviceWork:
    """A submitted step. Holds its arguments until the device is done with them.

    They were allocated on another stream: were they freed as soon as the launch returns, the allocator would give their memory to the next
    step's inputs while the device still reads it.
    """

    def __init__(self, launched: Future[tuple[Any, DeviceEvent]], args: tuple[Any, ...]) -> None:
        self._launched, self._args = launched, args

    def result(self, timeout: float | None = None) -> Any:
        result, event = self._launched.result(timeout)
        event.synchronize()
        self._args = ()
        return result

    def done(self) -> bool:
        return self._launched.done() and (self._launched.exception() is not None or self._launched.result()[1].query())
