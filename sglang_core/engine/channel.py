"""The two ends between an engine and its client: msgspec over ZMQ between processes, plain queues within one."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from sglang_core.types import FromEngine, ToEngine, ToFollower

_HIGH_WATER = 0  # no message is ever dropped; admission limits bound the queue
IDLE_WAIT = 0.5  # seconds


class EngineEnd(Protocol):
    """What the engine's loop reads and writes."""

    def receive(self, *, block: bool, wait: float = IDLE_WAIT) -> list[ToEngine]:
        """Every message that is there; with `block`, waits up to `wait` seconds for the first."""

    def send(self, message: FromEngine) -> None: ...
    def close(self) -> None: ...


class QueueEnd:
    """Both ends in one process: `post` is the client's way in, `deliver` its callback."""

    def __init__(self, deliver: Callable[[FromEngine], None]) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._deliver = deliver

    def post(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def receive(self, *, block: bool, wait: float = IDLE_WAIT) -> list[ToEngine]:
        messages: list[ToEngine] = []
        try:
            messages.append(self._inbox.get(block=block, timeout=wait if block else None))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: FromEngine) -> None:
        self._deliver(message)

    def close(self) -> None:
        return


class ZmqEnd:
    """The engine process's end: sockets in a directory that only this user may enter."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(_HIGH_WATER)
            socket.setsockopt(zmq.LINGER, 1000)
        self._inbox.connect(to_engine_address(directory))
        self._outbox.connect(from_engine_address(directory))
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, *, block: bool, wait: float = IDLE_WAIT) -> list[ToEngine]:
        messages: list[ToEngine] = []
        if block and not self._inbox.poll(int(wait * 1000)):
            return messages
        while True:
            try:
                messages.append(self._decoder.decode(self._inbox.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: FromEngine) -> None:
        self._outbox.send(self._encoder.encode(message))

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._context.term()


class PlanSender:
    """Rank 0's way to the other ranks: each step's plan as one message, encoded once, and what adapters plans may name."""

    def __init__(self, directory: Path, world_size: int) -> None:
        self._context = zmq.Context()
        self._sockets = []
        for rank in range(1, world_size):
            socket = self._context.socket(zmq.PUSH)
            socket.set_hwm(_HIGH_WATER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(plan_address(directory, rank))
            self._sockets.append(socket)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: ToFollower) -> None:
        data = self._encoder.encode(message)
        for socket in self._sockets:
            socket.send(data)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._context.term()


class PlanReceiver:
    """Another rank's end of `PlanSender`."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(_HIGH_WATER)
        self._socket.connect(plan_address(directory, rank))
        self._decoder = msgspec.msgpack.Decoder(ToFollower)

    def receive(self) -> ToFollower:
        """Waits for the next message; the rank ends with its parent, so there is no time limit."""
        message: ToFollower = self._decoder.decode(self._socket.recv())
        return message


def to_engine_address(directory: Path) -> str:
    return f"ipc://{directory}/to_engine"


def from_engine_address(directory: Path) -> str:
    return f"ipc://{directory}/from_engine"


def plan_address(directory: Path, rank: int) -> str:
    return f"ipc://{directory}/plan_{rank}"
