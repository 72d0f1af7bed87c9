"""What every route shares: client, running requests, drain. All generation passes through `Serving.generate`."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator

from sglang_core.config import EngineConfig
from sglang_core.engine.requests import Client, GenerateChunk, GenerateRequest
from sglang_core.errors import EngineDeadError, RequestError
from sglang_core.server.auth import Keys
from sglang_core.server.metrics import Metrics, RequestMeter

log = logging.getLogger(__name__)


class Serving:
    """One engine behind one HTTP server. Lives in one asyncio loop."""

    def __init__(self, client: Client, config: EngineConfig) -> None:
        self.client = client
        self.info = client.info
        self.config = config
        self.keys = Keys(config.server)
        self.metrics = Metrics(self.info.served_model_name) if config.server.enable_metrics else None
        self.is_draining = False
        self._running: dict[str, str] = {}  # every name a request answers to -> the group it belongs to
        self._rids: dict[str, str] = {}  # rid -> group
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return len(self._rids)

    @property
    def trouble(self) -> str | None:
        """Why no new request is taken; None when ready."""
        if not self.client.is_alive:
            return "the engine is not running"
        return "the server is shutting down" if self.is_draining else None

    async def generate(self, request: GenerateRequest, *, group: str = "") -> AsyncGenerator[GenerateChunk, None]:
        """`Client.generate`, counted, timed and logged. `group` names several requests of one body, for `abort`.
        Raises RequestError, EngineDeadError; an abort that the engine decided is raised too."""
        assert request.rid is not None
        self._check_open()
        names = _names(request.rid, request.sampling.n)
        self._claim(names, request.rid, group or request.rid)
        meter, how = RequestMeter(self.metrics, request), "abort"
        source = self.client.generate(request)
        try:
            async for chunk in source:
                meter.on_chunk(chunk)
                _raise_if_refused(chunk)
                yield chunk
        except Exception:
            how = "error"
            raise
        finally:
            try:
                await close(source)
            finally:
                meter.close(how)
                self._release(names, request.rid)
            if self.config.server.log_requests:
                _log_line(request.rid, meter)

    async def abort(self, rid: str) -> int:
        """Abort the requests of that rid or group, "" for all; the number of them."""
        rids = [r for r, group in self._rids.items() if rid in ("", r, group)]
        if rid == "":
            await self.client.abort("")
        for one in rids if rid else ():
            await self.client.abort(one)
        if rid and not rids:  # an answer's own name ("rid-1"), or a request that did not come over HTTP
            await self.client.abort(rid)
            return int(rid in self._running)
        return len(rids)

    async def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those running; False where some were left after `timeout` seconds."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _check_open(self) -> None:
        if not self.client.is_alive:
            raise EngineDeadError("the engine is not running; see the server's log")
        if self.is_draining:
            raise RequestError(
                "the server is shutting down; send the request to another one", code="shutting_down", status=503
            )

    def _claim(self, names: list[str], rid: str, group: str) -> None:
        taken = next((name for name in names if name in self._running), None)
        if taken is not None:
            message = f"rid={taken!r} is running already; wait for it, or leave rid out to have one drawn"
            raise RequestError(message, param="rid", code="duplicate_rid")
        self._running |= dict.fromkeys(names, group)
        self._rids[rid] = group
        self._idle.clear()

    def _release(self, names: list[str], rid: str) -> None:
        for name in names:
            del self._running[name]
        del self._rids[rid]
        if not self._rids:
            self._idle.set()


def draw_rid(prefix: str = "") -> str:
    return prefix + uuid.uuid4().hex


async def close(source: AsyncIterator[GenerateChunk]) -> None:
    """Close an iterator that may be a generator; closing is what aborts an unfinished request."""
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()


def _names(rid: str, n: int) -> list[str]:
    return [rid] if n == 1 else [rid, *(f"{rid}-{i}" for i in range(n))]


def _raise_if_refused(chunk: GenerateChunk) -> None:
    reason = chunk.finish_reason
    if reason is not None and reason.type == "abort" and reason.status is not None:
        raise RequestError(reason.message or "the engine aborted the request", code="aborted", status=reason.status)


def _log_line(rid: str, meter: RequestMeter) -> None:
    log.info(
        "rid=%s prompt=%d cached=%d completion=%d ttft=%s e2e=%.3fs finish=%s",
        rid,
        meter.prompt_tokens,
        meter.cached_tokens,
        meter.completion_tokens,
        "-" if meter.ttft is None else f"{meter.ttft:.3f}s",
        meter.elapsed,
        ",".join(meter.finish_reasons),
    )
