"""uvicorn's HTTP/1.1, with bounds that it leaves to a proxy: how large the head of a request may be, and how long it may take."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 256 << 10  # request line and headers; what arrives in one read with their end is not counted
HEAD_SECONDS = 60.0  # from the connection's, or the next request's, first byte to the end of its headers


class BoundedHeads(HttpToolsProtocol):
    """Closes the connection of a client that sends headers without end, or none at all. Bodies are the routes' to bound."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None  # set while a head is expected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._forget_head()
                self.send_400_response(f"The request line and headers have more than {MAX_HEAD_BYTES} bytes.")
                return
        super().data_received(data)

    def _expect_head(self) -> None:
        self._forget_head()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
