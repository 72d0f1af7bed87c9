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
    ) -> None:
        self.scheduler, self.runner, self.info = scheduler, runner, dict(info)
        self._eos_ids, self._max_in_flight, self._clock = eos_ids, max_in_flight, clock
        self._extra_stats, self._on_step = extra_stats, on_step
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
                for message in end.receive(block=not self.has_work):
                    self._send(end, self.handle(message))
                self._send(end, self.step())
        except Exception as e:
            log.exception("the engine cannot go on")
            end.send(EngineFailed(error=f"{type(e).__name__}: {e}"))
            raise
        finally:
            self.runner.close()

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
        return {**self.scheduler.stats(), **self._extra_stats()}

    def _add(self, message: AddReq) -> list[ReqOutput]:
        req = Req(
            rid=message.rid,
            input_ids=message.input_ids,
            sampling=message.sampling,
            logprob=message.logprob,
            namespace=(message.salt, "", ""),
            priority=message.priority,
            arrival=self._clock(),
            eos_ids=self._eos_ids,
        )
        try:
            return self.scheduler.add_req(req)
        except RequestError as e:
            status = 429 if isinstance(e, QueueFullError) else e.status
            return [ReqOutput(rid=req.rid, finish_reason=FinishReason("abort", message=str(e), status=status))]

    def _control(self, message: Control) -> ControlReply:
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
            case "shutdown":
                self._running = False
                return ControlReply(id=message.id, ok=True)

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
