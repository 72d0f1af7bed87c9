"""How a client reaches its engine: rank processes over ZMQ, or a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang_core.backend.placement import num_processes
from sglang_core.config import EngineConfig
from sglang_core.engine.channel import QueueEnd, from_engine_address, to_engine_address
from sglang_core.engine.launcher import Ranks
from sglang_core.errors import ConfigError
from sglang_core.types import Control, EngineFailed, EngineReady, FromEngine, ToEngine

Deliver = Callable[[FromEngine], None]


def open_link(config: EngineConfig, replica: int, deliver: Deliver) -> Link:
    """To an engine that is not started yet. `deliver` is called with all that it says, in the running loop."""
    return ThreadLink(config, deliver) if config.in_process else ProcessLink(config, replica, deliver)


class Link(ABC):
    """One engine, from its start to its end."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def send(self, message: ToEngine) -> None: ...

    @abstractmethod
    def dead(self) -> str | None:
        """What ended the engine, None while it runs."""

    @abstractmethod
    def stop(self, grace: float) -> None:
        """Wait `grace` seconds for the engine to end, then use force. Called in a thread."""

    @abstractmethod
    def kill(self) -> None:
        """Use force, and wait for nothing: a rank that hangs must not come back to life beside its successor."""

    async def closed(self) -> None:
        return


class ProcessLink(Link):
    """Rank processes, reached over ZMQ."""

    def __init__(self, config: EngineConfig, replica: int, deliver: Deliver) -> None:
        progress = config.server.log_level in ("debug", "info") and replica == 0
        self._ranks = Ranks(config, replica=replica, progress=progress)
        self._deliver = deliver
        self._context = zmq.asyncio.Context()
        self._outbox: Any = self._context.socket(zmq.PUSH)
        self._inbox: Any = self._context.socket(zmq.PULL)
        for socket in (self._outbox, self._inbox):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
        self._encoder = msgspec.msgpack.Encoder()
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        try:
            self._outbox.bind(to_engine_address(self._ranks.directory))
            self._inbox.bind(from_engine_address(self._ranks.directory))
        except zmq.ZMQError as e:
            raise ConfigError(
                f"no sockets can be made in {self._ranks.directory}: {e}; set TMPDIR to another folder"
            ) from e
        self._ranks.start()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            self._deliver(decoder.decode(await self._inbox.recv()))

    def send(self, message: ToEngine) -> None:
        self._outbox.send(self._encoder.encode(message))  # the queue has no bound, so this never waits

    def dead(self) -> str | None:
        if self._reader is not None and self._reader.done():
            return f"the engine's news cannot be read: {self._reader.exception()!r}"
        return self._ranks.dead()

    def stop(self, grace: float) -> None:
        self._ranks.stop(grace=grace)

    def kill(self) -> None:
        self._ranks.kill()

    async def closed(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._outbox.close()
        self._inbox.close()
        self._context.term()

    @property
    def pids(self) -> list[int]:
        return self._ranks.pids


class ThreadLink(Link):
    """The same engine loop in a thread of this process."""

    def __init__(self, config: EngineConfig, deliver: Deliver) -> None:
        self._config, self._loop = config, asyncio.get_running_loop()
        self._end = QueueEnd(self._post_to_loop)
        self._deliver = deliver
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        sizes = self._config.parallel
        if sizes.dp_size > 1:
            raise ConfigError(
                f"in_process=True runs one engine, and dp_size={sizes.dp_size} makes as many; drop one of them"
            )
        if num_processes(self._config.device.device, tp_size=sizes.tp_size) > 1:
            raise ConfigError(
                f"in_process=True runs one process, and tp_size={sizes.tp_size} makes as many; drop one of them"
            )
        self._thread.start()

    def _serve(self) -> None:
        try:
            from sglang_core.engine.build import build_engine

            core = build_engine(self._config, world_size=1, directory=None, progress=False)
        except Exception as e:
            self._end.send(EngineFailed(error=str(e)))
            return
        self._end.send(EngineReady(info=dict(core.info)))
        with contextlib.suppress(Exception):  # said as EngineFailed already
            core.run(self._end)

    def _post_to_loop(self, message: FromEngine) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody reads
            self._loop.call_soon_threadsafe(self._deliver, message)

    def send(self, message: ToEngine) -> None:
        self._end.post(message)

    def dead(self) -> str | None:
        started = self._thread.ident is not None
        return "the engine thread ended" if started and not self._thread.is_alive() else None

    def stop(self, grace: float) -> None:
        if self._thread.ident is not None:
            self.kill()
            self._thread.join(30)

    def kill(self) -> None:
        self._end.post(Control(id=-1, action="shutdown"))  # a thread ends of itself or not at all
