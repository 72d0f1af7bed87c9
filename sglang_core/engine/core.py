"""`EngineCore`: the step loop. One per replica, in rank 0; it owns the scheduler and drives the runner.

Overlap: up to `max_in_flight` steps are launched before the oldest is waited for, so the host schedules step n + 1 while the
device computes step n. Without overlap the queue holds one step; the loop is the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from sglang_core.engine.adapter_names import unknown_adapter
from sglang_core.engine.adapters import Adapters, refusal
from sglang_core.engine.channel import EngineEnd
from sglang_core.errors import QueueFullError, RequestError
from sglang_core.scheduler.scheduler import Scheduler
from sglang_core.types import (
    AbortReq,
    AddReq,
    Batch,
    Control,
    ControlReply,
    EngineFailed,
    FinishReason,
    FinishReqAt,
    FromEngine,
    OutputBatch,
    Req,
    ReqOutput,
    StepPlan,
    StepResult,
    ToEngine,
)

log = logging.getLogger(__name__)
LOOK_AGAIN = 0.02  # seconds between two looks at an adapter that is being read, where nothing else is to do
SIGN_OF_LIFE = 0.4  # seconds of silence after which the loop says that it runs; shorter than an idle wait


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """What executes plans: the model runner, or a fake in tests."""

    def launch(self, plan: StepPlan) -> Pending: ...
    def close(self) -> None: ...


class EngineCore:
    """Scheduler and runner joined. `step` and `handle` are called by one thread only."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_ids: frozenset[int],
        max_in_flight: int,
        clock: Callable[[], float],
        info: Mapping[str, object],
        extra_stats: Callable[[], Mapping[str, float]] = dict,
        on_step: Callable[[StepPlan], None] = lambda plan: None,
        adapters: Adapters | None = None,
    ) -> None:
        self.scheduler, self.runner, self.info = scheduler, runner, dict(info)
        self._eos_ids, self._max_in_flight, self._clock = eos_ids, max_in_flight, clock
        self._extra_stats, self._on_step, self._adapters = extra_stats, on_step, adapters
        self._in_flight: deque[tuple[Batch, Pending]] = deque()
        self._running = True
        self._last_sent = clock()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> list[ReqOutput]:
        """Launch the next batch if there is one; once enough steps are in flight, or nothing can start, finish the oldest."""
        if len(self._in_flight) < self._max_in_flight and (batch := self.scheduler.schedule()) is not None:
            self._on_step(batch.plan)
            self._in_flight.append((batch, self.runner.launch(batch.plan)))
            if len(self._in_flight) < self._max_in_flight:
                return []
        if not self._in_flight:
            return []
        batch, pending = self._in_flight.popleft()
        return self.scheduler.process_results(batch, pending.result())

    def run(self, end: EngineEnd) -> None:
        """Serve until told to shut down. A failing step fails every req and ends the loop: device state is unknown."""
        try:
            while self._running:
                for message in self._receive(end):
                    self._send(end, self.handle(message))
                if self._adapters is not None and self._adapters.is_busy:
                    for news in self._adapters.poll():
                        self._send(end, news)
                self._send(end, self.step())
        except Exception as e:
            log.exception("the engine cannot go on")
            end.send(EngineFailed(error=f"{type(e).__name__}: {e}"))
            raise
        finally:
            self.runner.close()
            if self._adapters is not None:
                self._adapters.close()

    def handle(self, message: ToEngine) -> list[ReqOutput] | ControlReply:
        match message:
            case AddReq():
                return self._add(message)
            case AbortReq(rid=rid):
                return self.scheduler.abort(rid)
            case FinishReqAt(rid=rid, num_output_tokens=num, matched=matched):
                return self.scheduler.finish_at(rid, num, matched)
            case Control():
                return self._control(message)

    def stats(self) -> dict[str, float]:
        adapters = self._adapters.stats() if self._adapters is not None else {}
        return {**self.scheduler.stats(), **self._extra_stats(), **adapters}

    def _receive(self, end: EngineEnd) -> list[ToEngine]:
        """Waits where nothing can run, but not for long where that may change by itself."""
        if self._adapters is not None and self._adapters.is_busy:
            return end.receive(block=not self._in_flight and not self.scheduler.can_run, wait=LOOK_AGAIN)
        return end.receive(block=not self.has_work)

    def _add(self, message: AddReq) -> list[ReqOutput]:
        req = Req(
            rid=message.rid,
            input_ids=message.input_ids,
            sampling=message.sampling,
            logprob=message.logprob,
            priority=message.priority,
            arrival=self._clock(),
            eos_ids=self._eos_ids,
        )
        try:
            if message.adapter:
                if self._adapters is None:
                    raise unknown_adapter(message.adapter, [])
                self._adapters.add_req(req, message.adapter)
            req.namespace = (message.salt, req.adapter, "")
            return self.scheduler.add_req(req)
        except RequestError as e:
            status = 429 if isinstance(e, QueueFullError) else e.status
            return [ReqOutput(rid=req.rid, finish_reason=FinishReason("abort", message=str(e), status=status))]

    def _control(self, message: Control) -> ControlReply | list[ReqOutput]:
        match message.action:
            case "flush_cache":
                ok = self.scheduler.flush_cache()
                return ControlReply(
                    id=message.id, ok=ok, message="" if ok else "running requests pin pages; retry once they end"
                )
            case "stats":
                return ControlReply(id=message.id, ok=True, data=dict(self.stats()))
            case "info":
                return ControlReply(id=message.id, ok=True, data=self.info)
            case "load_adapter" | "unload_adapter":
                return self._control_adapter(message)
            case "shutdown":
                self._running = False
                return ControlReply(id=message.id, ok=True)

    def _control_adapter(self, message: Control) -> ControlReply | list[ReqOutput]:
        """The answer comes from `poll`, once the adapter is read or its last req has ended; a refusal comes at once."""
        assert message.adapter is not None, "an action on adapters names one"
        if self._adapters is None:
            why = "this engine keeps no room for adapters; start it with --enable-lora or --lora-paths"
            return refusal(message.id, why, 400, None)
        try:
            if message.action == "load_adapter":
                self._adapters.load(message.adapter, message.id)
            else:
                self._adapters.unload(message.adapter.name, message.id)
        except RequestError as e:
            return refusal(message.id, str(e), e.status, e.param)
        return []

    def _send(self, end: EngineEnd, news: list[ReqOutput] | ControlReply) -> None:
        if isinstance(news, ControlReply):
            end.send(news)
        elif news or self._clock() - self._last_sent > SIGN_OF_LIFE:
            end.send(OutputBatch(outputs=news, stats=self.stats()))
            self._last_sent = self._clock()


def encode_info(info: Any) -> dict[str, object]:
    """A struct or dataclass as plain data for `EngineReady`."""
    return dict(msgspec.to_builtins(info))


__all__ = ["EngineCore", "FromEngine", "encode_info"]
