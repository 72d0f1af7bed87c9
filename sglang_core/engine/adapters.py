"""Which adapters are served, by name: loaded and unloaded beside the steps, at most so many in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sglang_core.engine.adapter_names import unknown_adapter
from sglang_core.errors import QueueFullError, RequestError, SglangError
from sglang_core.runner.adapters import AdapterHost, adapter_key
from sglang_core.scheduler.scheduler import Scheduler
from sglang_core.types import AdapterSource, ControlReply, DropAdapter, LoadAdapter, Req, ReqOutput
from sglang_core.weights.adapter import Adapter, AdapterFiles

HOLD = "adapter"
News = ControlReply | list[ReqOutput]


@dataclass(slots=True)
class Served:
    """An adapter that requests may name. `is_loaded`: it is in host memory, not only on disk."""

    source: AdapterSource
    key: str
    is_loaded: bool = True


@dataclass(slots=True)
class Reading:
    """An adapter on its way into host memory: for a control, or again for reqs that wait for it."""

    source: AdapterSource
    result: Future[tuple[AdapterFiles, Adapter]]
    control_id: int | None = None
    rids: list[str] = field(default_factory=list)


class Adapters:
    """Rank 0's registry. All calls come from the engine's loop; only the reading happens elsewhere.

    An adapter leaves host memory when another needs its place and no req waits or runs with it, the least recently asked for
    first; a req that names it has it read again. One that is unloaded is not found any more, and freed once its last req ended.
    """

    def __init__(
        self,
        host: AdapterHost,
        scheduler: Scheduler,
        *,
        max_loaded: int | None,
        tell: Callable[[LoadAdapter | DropAdapter], None] = lambda message: None,
    ) -> None:
        self._host, self._scheduler, self._max_loaded, self._tell = host, scheduler, max_loaded, tell
        self._served: dict[str, Served] = {}  # by name, least recently asked for first
        self._reading: list[Reading] = []
        self._draining: list[tuple[str, int | None]] = []  # key, and the control to answer when it is gone

    @property
    def is_busy(self) -> bool:
        """Whether `poll` may have news without a message or a step."""
        return bool(self._reading or self._draining)

    def start_with(self, source: AdapterSource, version: str) -> None:
        """Serve one that every rank has loaded at start."""
        self._serve(source, adapter_key(source.name, version))

    def add_req(self, req: Req, name: str) -> None:
        """Give a new req its adapter, and hold it back while that is read. Raises RequestError for one that is not served."""
        served = self._served.pop(name, None)
        if served is None:
            raise unknown_adapter(name, list(self._served))
        self._served[name] = served
        req.adapter = served.key
        if served.is_loaded:
            return
        reading = next((r for r in self._reading if r.control_id is None and r.source.name == name), None)
        if reading is None:
            self._make_room()
            reading = Reading(served.source, self._host.read(served.source.path))
            self._reading.append(reading)
        reading.rids.append(req.rid)
        req.holds.add(HOLD)

    def load(self, source: AdapterSource, control_id: int) -> None:
        """Begin to load an adapter; `poll` has the answer. Raises RequestError where there is no place for it."""
        if any(reading.source.name == source.name for reading in self._reading):
            raise RequestError(
                f"adapter {source.name!r} is being loaded already; wait for that", param="lora_name", status=409
            )
        if source.name not in self._served:
            self._make_room()
        self._reading.append(Reading(source, self._host.read(source.path), control_id))

    def unload(self, name: str, control_id: int) -> None:
        """Serve it to nobody new; `poll` has the answer once its last req has ended."""
        if name not in self._served:
            raise unknown_adapter(name, list(self._served))
        self._draining.append((self._served.pop(name).key, control_id))

    def poll(self) -> list[News]:
        """What has finished since the last call."""
        news: list[News] = []
        for reading in [r for r in self._reading if r.result.done()]:
            self._reading.remove(reading)
            news += self._read(reading)
        for key, control_id in [d for d in self._draining if not self._scheduler.uses_adapter(d[0])]:
            self._draining.remove((key, control_id))
            if all(served.key != key for served in self._served.values()):  # not loaded again meanwhile
                self._scheduler.adapters.forget(key)
                self._drop(key)
            if control_id is not None:
                news.append(ControlReply(id=control_id, ok=True))
        return news

    def stats(self) -> Mapping[str, float]:
        """Gauges and totals, by the names under which they are exported."""
        slots = self._scheduler.adapters
        return {
            "lora_adapters": float(len(self._served)),
            "lora_adapters_in_host_memory": float(self._num_loaded),
            "lora_adapters_on_device": float(slots.num_resident),
            "lora_slot_writes": float(slots.num_writes),
        }

    def close(self) -> None:
        self._host.close()

    @property
    def _num_loaded(self) -> int:
        return sum(served.is_loaded for served in self._served.values())

    def _read(self, reading: Reading) -> list[News]:
        try:
            files, adapter = reading.result.result()
            if reading.control_id is not None:
                self._loaded(reading.source, files, adapter)
                return [ControlReply(id=reading.control_id, ok=True, data={"version": files.version})]
            return self._loaded_again(reading, files, adapter)
        except SglangError as e:
            return self._not_read(reading, str(e))
        except (
            Exception
        ) as e:  # a disk that fails, a file that is not what its header says: no reason for the engine to end
            return self._not_read(reading, f"{reading.source.path} cannot be read: {type(e).__name__}: {e}")

    def _not_read(self, reading: Reading, message: str) -> list[News]:
        if reading.control_id is not None:
            return [refusal(reading.control_id, message, 400, "lora_path")]
        return [self._scheduler.fail(rid, message, 500) for rid in reading.rids]

    def _loaded(self, source: AdapterSource, files: AdapterFiles, adapter: Adapter) -> None:
        key = adapter_key(source.name, files.version)
        if source.pinned:
            self._scheduler.adapters.pin(key)
        before = self._served.get(source.name)
        if before is not None and before.key != key:  # reqs that have begun with the old weights end with them
            self._draining.append((before.key, None))
        self._host.add(key, adapter)
        self._tell(LoadAdapter(key=key, path=source.path))
        self._serve(source, key)

    def _loaded_again(self, reading: Reading, files: AdapterFiles, adapter: Adapter) -> list[News]:
        served = self._served.get(reading.source.name)
        key = adapter_key(reading.source.name, files.version)
        if served is None or served.key != key:
            what = "was unloaded" if served is None else f"changed on disk ({reading.source.path})"
            return self._not_read(
                reading, f"adapter {reading.source.name!r} {what} while it was read again; load it anew"
            )
        self._host.add(key, adapter)
        self._tell(LoadAdapter(key=key, path=reading.source.path))
        served.is_loaded = True
        for rid in reading.rids:
            self._scheduler.release_hold(rid, HOLD)
        return []

    def _serve(self, source: AdapterSource, key: str) -> None:
        self._served.pop(source.name, None)
        self._served[source.name] = Served(source, key)

    def _make_room(self) -> None:
        """Let one leave host memory if all places are taken. Raises QueueFullError where each is in use."""
        if self._max_loaded is None or self._num_loaded + len(self._reading) < self._max_loaded:
            return
        for served in self._served.values():
            if served.is_loaded and not served.source.pinned and not self._scheduler.uses_adapter(served.key):
                served.is_loaded = False
                self._drop(served.key)
                return
        raise QueueFullError(
            f"all {self._max_loaded} adapters that may be in host memory are in use or pinned; retry later, or raise --max-loaded-loras"
        )

    def _drop(self, key: str) -> None:
        self._host.drop(key)
        self._tell(DropAdapter(key=key))


def refusal(control_id: int, message: str, status: int, param: str | None) -> ControlReply:
    data: dict[str, Any] = {"status": status, "param": param}
    return ControlReply(id=control_id, ok=False, message=message, data=data)
